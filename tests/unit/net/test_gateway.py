"""The gateway with real clients: curl and Python's own, over HTTP and HTTPS, to real servers."""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.egress_lab import (
    HttpServer,
    Lab,
    dns_query,
    egress_lab,
    http_server,
    read_all,
)
from tests.support.waiting import PATIENCE_S

from taskvm.net.names import SyntheticNames
from taskvm.wire.frames import GUEST_STREAM_BIT, FrameType


async def curl(*arguments: str) -> tuple[str, int]:
    """Run the real curl; return what it printed and its exit code."""
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "--max-time", f"{PATIENCE_S:.0f}", *arguments,
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
    client = http.client.HTTPSConnection("api.test", port, timeout=PATIENCE_S)
    raw = socket.create_connection(("127.0.0.1", local), timeout=PATIENCE_S)
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
        async with asyncio.timeout(PATIENCE_S):
            rcode, _ = await lab.guest.resolve("one.api.test")

    assert rcode == 0
