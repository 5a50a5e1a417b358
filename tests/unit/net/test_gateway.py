"""The gateway with real clients: curl and Python's own, over HTTP and HTTPS, to real servers."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from egress_lab import (
    HttpServer,
    Lab,
    dns_query,
    egress_lab,
    http_server,
    read_all,
    scripted_server,
)

from taskvm.net.names import SyntheticNames
from taskvm.wire.frames import GUEST_STREAM_BIT, FrameType


async def curl(*arguments: str) -> tuple[str, int]:
    """Run the real curl; return what it printed and its exit code."""
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "--max-time", "20", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    output, _ = await process.communicate()
    return output.decode(), process.returncode or 0


async def test_curl_fetches_over_http() -> None:
    with http_server() as server:
        async with egress_lab(
            allow=["api.test"],
            allow_addresses=[f"127.0.0.1:{server.port}"],
            hosts={"api.test": ["127.0.0.1"]},
        ) as lab:
            address = await lab.address_of("api.test")

            async with lab.guest.listen(address, server.port) as local:
                output, code = await curl(
                    "--connect-to", f"api.test:{server.port}:127.0.0.1:{local}",
                    f"http://api.test:{server.port}/path?query=1",
                )  # fmt: skip

    assert (output, code) == ("hello from the server", 0)
    assert server.requests[0].path == "/path?query=1"
    assert server.requests[0].header("Host") == f"api.test:{server.port}"
    assert [(e.kind, e.decision) for e in lab.events] == [
        ("dns", "allow"), ("request", "allow"), ("connect", "allow"), ("response", "allow"),
    ]  # fmt: skip


async def test_curl_uploads_over_https_and_trusts_our_authority_only(tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(b"x" * 3_000_000)
    with http_server("api.test") as server:
        async with egress_lab(
            allow=["api.test"],
            allow_addresses=[f"127.0.0.1:{server.port}"],
            hosts={"api.test": ["127.0.0.1"]},
        ) as lab:
            address = await lab.address_of("api.test")

            async with lab.guest.listen(address, server.port) as local:
                output, code = await curl(
                    "--connect-to", f"api.test:{server.port}:127.0.0.1:{local}",
                    "--cacert", lab.ca_file, "--data-binary", f"@{upload}",
                    f"https://api.test:{server.port}/",
                )  # fmt: skip

    assert (len(output), code) == (3_000_000, 0)
    assert len(server.requests[0].body) == 3_000_000


async def test_python_keeps_its_connection_alive_with_strict_verification() -> None:
    with http_server("api.test") as server:
        async with egress_lab(
            allow=["api.test"],
            allow_addresses=[f"127.0.0.1:{server.port}"],
            hosts={"api.test": ["127.0.0.1"]},
        ) as lab:
            address = await lab.address_of("api.test")

            async with lab.guest.listen(address, server.port) as local:
                bodies = await asyncio.to_thread(_python_client, lab, server.port, local)

    assert bodies == [b"hello from the server", b"posted", b"hello from the server"]
    assert server.connections == 1
    assert [request.method for request in server.requests] == ["GET", "POST", "HEAD", "GET"]


def _python_client(lab: Lab, port: int, local: int) -> list[bytes]:
    client = http.client.HTTPSConnection("api.test", port, timeout=20)
    raw = socket.create_connection(("127.0.0.1", local), timeout=20)
    client.sock = lab.client_tls().wrap_socket(raw, server_hostname="api.test")
    bodies = []
    for method, body in (("GET", None), ("POST", b"posted"), ("HEAD", None), ("GET", None)):
        client.request(method, "/", body)
        response = client.getresponse()
        assert response.status == 200
        assert response.getheader("Alt-Svc") is None
        content = response.read()
        if method != "HEAD":
            bodies.append(content)
    client.close()
    return bodies


@asynccontextmanager
async def sandbox(server: HttpServer) -> AsyncIterator[Lab]:
    """A sandbox that may reach `api.test`, where the server listens."""
    async with egress_lab(
        allow=["api.test"],
        allow_addresses=[f"127.0.0.1:{server.port}"],
        hosts={"api.test": ["127.0.0.1"]},
    ) as lab:
        yield lab


async def test_curl_waits_for_100_continue_and_gets_the_servers_own() -> None:
    """The body is sent only when the server asks for it: curl would wait a second otherwise."""
    async with (
        scripted_server(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        ) as server,
        sandbox(server) as lab,
    ):
        sock = await lab.connect("api.test", server.port)
        head = f"POST / HTTP/1.1\r\nHost: api.test:{server.port}\r\nContent-Length: 4\r\n"
        await sock.write(f"{head}Expect: 100-continue\r\n\r\n".encode())
        async with asyncio.timeout(5):
            answer = await sock.read_all()

    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert b"Expect: 100-continue" in server.requests[0].body


async def test_a_chunked_upload_and_a_chunked_answer_with_trailers_pass() -> None:
    answer = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\n0\r\nX-Sum: 1\r\nContent-Length: 9\r\n\r\n"
    )
    async with scripted_server(answer, close=False) as server, sandbox(server) as lab:
        sock = await lab.connect("api.test", server.port)
        request = (
            f"POST / HTTP/1.1\r\nHost: api.test:{server.port}\r\nConnection: close\r\n"
            "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-In: 2\r\n\r\n"
        )
        received = await sock.exchange(request.encode())

    head, _, body = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    assert body == b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n"


async def test_an_old_client_gets_a_body_that_ends_with_the_connection() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n"
    async with scripted_server(answer) as server, sandbox(server) as lab:
        sock = await lab.connect("api.test", server.port)
        received = await sock.exchange(
            f"GET / HTTP/1.0\r\nHost: api.test:{server.port}\r\n\r\n".encode()
        )

    assert received.endswith(b"\r\n\r\nabc")


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_an_answer_without_a_body_keeps_the_connection(status: bytes) -> None:
    async with (
        scripted_server(b"HTTP/1.1 " + status + b"\r\nETag: x\r\n\r\n") as server,
        sandbox(server) as lab,
    ):
        sock = await lab.connect("api.test", server.port)
        request = f"GET / HTTP/1.1\r\nHost: api.test:{server.port}\r\n\r\n".encode()
        await sock.write(request)
        first = await sock.read()
        await sock.write(request)
        second = await sock.read()

    assert first == second == b"HTTP/1.1 " + status + b"\r\nETag: x\r\n\r\n"
    assert server.connections == 2  # the server closed; the guest did not notice


async def test_a_final_answer_before_the_end_of_the_upload_is_delivered() -> None:
    async with (
        scripted_server(
            b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig", close=False
        ) as server,
        sandbox(server) as lab,
    ):
        sock = await lab.connect("api.test", server.port)
        head = f"POST / HTTP/1.1\r\nHost: api.test:{server.port}\r\nContent-Length: 99999\r\n\r\n"
        async with asyncio.timeout(5):
            answer = await sock.exchange(head.encode() + b"x" * 1000)

    assert answer.startswith(b"HTTP/1.1 413")
    assert answer.endswith(b"big")


async def test_a_guest_that_does_not_read_holds_the_server_back() -> None:
    """Memory is bounded: the server is stopped by what the guest and the kernel hold."""
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
                sent += 65536

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    seen = HttpServer(server.sockets[0].getsockname()[1])
    async with sandbox(seen) as lab:
        sock = await lab.connect("api.test", seen.port)
        await sock.write(f"GET / HTTP/1.1\r\nHost: api.test:{seen.port}\r\n\r\n".encode())
        await asyncio.sleep(0.5)
        stalled = sent
        await asyncio.sleep(0.3)

        assert 0 < stalled == sent < 12_000_000
        sock.reset()
        async with asyncio.timeout(5):
            while lab.gateway.connections:
                await asyncio.sleep(0.01)
    server.close()


async def test_many_connections_at_once_are_all_served() -> None:
    with http_server("api.test") as server:
        async with sandbox(server) as lab:
            address = await lab.address_of("api.test")

            async def fetch(number: int) -> bytes:
                async with lab.tls(address, server.port, "api.test") as stream:
                    await stream.write(
                        f"GET /{number} HTTP/1.1\r\nHost: api.test:{server.port}\r\n"
                        "Connection: close\r\n\r\n".encode()
                    )
                    return await read_all(stream)

            answers = await asyncio.gather(*(fetch(number) for number in range(40)))

    assert all(answer.endswith(b"hello from the server") for answer in answers)
    assert len({seen.path for seen in server.requests}) == 40


async def test_what_the_resolver_or_the_server_refuses_is_a_bad_gateway() -> None:
    async with egress_lab(
        allow=["gone.test", "closed.test"],
        allow_addresses=["127.0.0.1:9"],
        hosts={"closed.test": ["127.0.0.1"]},
    ) as lab:
        reasons = []
        for name in ("gone.test", "closed.test"):
            sock = await lab.connect(name, 9)
            answer = await sock.exchange(f"GET / HTTP/1.1\r\nHost: {name}:9\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 502")
            reasons.append(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["reason"])

        assert reasons == ["the name does not exist or has no address", "Connection refused"]
        assert [e.decision for e in lab.events if e.kind == "connect"] == ["error", "error"]


async def test_a_head_request_is_refused_without_a_body() -> None:
    async with egress_lab(allow=["api.test"]) as lab:
        sock = await lab.guest.connect("192.0.2.1", 80)
        answer = await sock.exchange(b"HEAD / HTTP/1.1\r\nHost: 192.0.2.1\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 403")
    assert answer.endswith(b"\r\n\r\n")


async def test_the_synthetic_addresses_survive_a_checkpoint() -> None:
    async with egress_lab(allow=["*.api.test"]) as lab:
        addresses = [await lab.address_of(f"{n}.api.test") for n in "abc"]

        again = SyntheticNames(lab.gateway.names.export())

    assert [str(again.address_of(f"{n}.api.test")) for n in "abc"] == addresses


async def test_dns_in_bulk_neither_blocks_nor_grows() -> None:
    """Ten thousand queries that nobody reads the answers of; then one that somebody does."""
    async with egress_lab(allow=["*.api.test"]) as lab:
        for number in range(10_000):
            query = dns_query(f"n{number}.evil.test")
            lab.guest.port.send(FrameType.DATAGRAM, 0, GUEST_STREAM_BIT | 1, query)
        lab.guest.ignored = {GUEST_STREAM_BIT | 1}
        async with asyncio.timeout(20):
            rcode, _ = await lab.guest.resolve("one.api.test")

    assert rcode == 0
