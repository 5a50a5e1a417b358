"""Attacks on the network of a sandbox.

Judged from the host's side: what reached the server (the canary), what the resolver was asked, what
the record says.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from tests.support.egress_lab import (
    HttpServer,
    Lab,
    dns_query,
    egress_lab,
    http_server,
    read_all,
    scripted_server,
)
from tests.support.waiting import PATIENCE_S, until

from taskvm.errors import GuestProtocolError
from taskvm.net import connection
from taskvm.port import StreamReset
from taskvm.wire.frames import FrameType, encode_frame

NXDOMAIN = 3


@pytest.fixture
def canary() -> Iterator[HttpServer]:
    """A server in clear that no refused request may reach."""
    with http_server() as server:
        yield server


@pytest.fixture
def tls_canary() -> Iterator[HttpServer]:
    """The same over TLS, with certificates for two names."""
    with http_server("api.test", "other.test") as server:
        yield server


@asynccontextmanager
async def lab_for(server: HttpServer, *allow: str) -> AsyncIterator[Lab]:
    """A sandbox that may reach `api.test` (or `allow`), where the canary listens."""
    async with egress_lab(
        allow=allow or ["api.test", "other.test"],
        allow_addresses=[f"127.0.0.1:{server.port}"],
        hosts={"api.test": ["127.0.0.1"], "other.test": ["127.0.0.1"], "evil.test": ["127.0.0.1"]},
    ) as lab:
        yield lab


def request(host: str, *headers: str, line: str = "GET / HTTP/1.1") -> bytes:
    return "\r\n".join([line, f"Host: {host}", *headers, "", ""]).encode("latin-1")


def body_of(answer: bytes) -> dict[str, str]:
    error: dict[str, str] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return error


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# Names.


@pytest.mark.parametrize(
    "name",
    ["evil.test", "secret-data.evil.test", "api.test.evil.test", "xapi.test", "sub.api.test",
     "localhost", "metadata.google.internal"],
)  # fmt: skip
async def test_a_denied_name_does_not_exist_and_nobody_is_asked(
    canary: HttpServer, name: str
) -> None:
    async with lab_for(canary) as lab:
        rcode, address = await lab.guest.resolve(name)

        assert (rcode, address) == (NXDOMAIN, None)
        assert lab.resolver.asked == []
        assert lab.denials("dns")[0].host == name


async def test_an_allowed_name_is_not_looked_up_before_a_request_is_judged(
    canary: HttpServer,
) -> None:
    async with lab_for(canary) as lab:
        sock = await lab.connect("api.test", canary.port)
        await sock.write(b"GET / HTT")

        assert lab.resolver.asked == []


async def test_only_address_records_are_answered(canary: HttpServer) -> None:
    async with lab_for(canary) as lab:
        answers = {qtype: await lab.guest.resolve("api.test", qtype) for qtype in (28, 65, 64)}
        text = await lab.guest.resolve("api.test", 16)

    assert set(answers.values()) == {(0, None)}
    assert text == (5, None)


async def test_a_name_with_nul_or_upper_case_is_not_another_name(canary: HttpServer) -> None:
    async with lab_for(canary) as lab:
        nul = await lab.guest.query(dns_query("api.test\0.evil.test"))
        upper = await lab.guest.resolve("API.Test")
        same = await lab.guest.resolve("api.test")

    assert nul[3] & 15 == 1
    assert upper == same


# Addresses.


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "198.18.0.200", "198.18.0.1", "8.8.8.8"]
)
async def test_an_address_that_no_rule_names_is_refused(canary: HttpServer, address: str) -> None:
    async with egress_lab(allow=["api.test"]) as lab:
        sock = await lab.guest.connect(address, canary.port)
        answer = await sock.exchange(request("api.test"))

        assert status_of(answer) == 403
        assert body_of(answer)["type"] == "egress_denied"
        assert lab.denials("connect")[0].address == address
    assert canary.connections == 0


async def test_an_allowed_name_with_an_internal_address_is_refused(canary: HttpServer) -> None:
    hosts = {"api.test": ["127.0.0.1"]}
    async with egress_lab(allow=["api.test"], hosts=hosts) as lab:
        sock = await lab.connect("api.test", canary.port)
        answer = await sock.exchange(request(f"api.test:{canary.port}"))

        assert status_of(answer) == 403
        assert b"127.0.0.1" not in answer
        assert lab.denials("connect")[0].address == "127.0.0.1"
    assert canary.connections == 0


@pytest.mark.parametrize(
    "address",
    [
        "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "0.0.0.0", "::",
        "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "224.0.0.1",
    ],
)  # fmt: skip
async def test_a_name_cannot_hide_an_internal_address(canary: HttpServer, address: str) -> None:
    async with egress_lab(
        allow=["api.test"],
        allow_addresses=[f"127.0.0.1:{canary.port}"],
        hosts={"api.test": [address]},
    ) as lab:
        sock = await lab.connect("api.test", canary.port)
        answer = await sock.exchange(request(f"api.test:{canary.port}"))

        assert status_of(answer) == 403
        assert address.encode() not in answer
    assert canary.connections == 0


async def test_a_second_lookup_cannot_change_the_address(canary: HttpServer) -> None:
    """Rebinding:

    what is dialled is what was judged; a new connection is looked up and judged anew.
    """
    async with lab_for(canary) as lab:
        sock = await lab.connect("api.test", canary.port)
        host = f"api.test:{canary.port}"
        await sock.write(request(host))
        first = await sock.read_response()
        lab.resolver.table["api.test"] = ["169.254.169.254"]
        second = await (await lab.connect("api.test", canary.port)).exchange(request(host))

        assert (status_of(first), status_of(second)) == (200, 403)
        assert lab.resolver.asked == ["api.test", "api.test"]
    assert canary.connections == 1


async def test_only_the_addresses_that_pass_are_dialled(canary: HttpServer) -> None:
    async with egress_lab(
        allow=["api.test"],
        allow_addresses=[f"127.0.0.1:{canary.port}"],
        hosts={"api.test": ["169.254.169.254", "127.0.0.1"]},
    ) as lab:
        sock = await lab.connect("api.test", canary.port)
        await sock.write(request(f"api.test:{canary.port}", "Connection: close"))
        answer = await sock.read_all()

    assert status_of(answer) == 200


# Authority: what the connection claims to mean.


@pytest.mark.parametrize(
    "host",
    ["evil.test", "other.test", "api.test", "api.test:1", "api.test:{port}@evil.test",
     "evil.test@api.test:{port}", "api.test:{port}:80", "[api.test]:{port}", "127.0.0.1:{port}",
     "api.test\t:{port}", "api.test%00.evil.test:{port}", "api.test:{port},evil.test", "",
     "api..test:{port}", "\uff41pi.test:{port}"],
)  # fmt: skip
async def test_a_host_header_that_is_not_the_connections_is_refused(
    canary: HttpServer, host: str
) -> None:
    async with lab_for(canary) as lab:
        sock = await lab.connect("api.test", canary.port)
        head = f"GET / HTTP/1.1\r\nHost: {host.format(port=canary.port)}\r\n\r\n"
        answer = await sock.exchange(head.encode())

        assert status_of(answer) in (400, 403)
        assert lab.denials("request")
    assert canary.connections == 0


@pytest.mark.parametrize(
    "target", ["http://evil.test/", "http://other.test:{port}/", "https://api.test:{port}/",
               "http://u:p@api.test:{port}/", "http:/api.test/", "api.test:{port}/", "/#fragment",
               "/a\\b"],
)  # fmt: skip
async def test_a_target_that_is_not_the_connections_is_refused(
    canary: HttpServer, target: str
) -> None:
    async with lab_for(canary) as lab:
        sock = await lab.connect("api.test", canary.port)
        line = f"GET {target.format(port=canary.port)} HTTP/1.1"
        answer = await _answer_or_reset(sock, request(f"api.test:{canary.port}", line=line))

    assert answer == b"" or status_of(answer) in (400, 403)
    assert canary.connections == 0


async def test_every_request_of_a_connection_is_judged(canary: HttpServer) -> None:
    async with lab_for(canary) as lab:
        sock = await lab.connect("api.test", canary.port)
        await sock.write(request(f"api.test:{canary.port}"))
        first = await sock.read_response()
        second = await sock.exchange(request(f"other.test:{canary.port}"))

        assert (status_of(first), status_of(second)) == (200, 403)
    assert len(canary.requests) == 1


async def test_a_server_name_that_is_not_the_connections_is_refused(
    tls_canary: HttpServer,
) -> None:
    """Domain fronting in both directions, and no name at all."""
    async with lab_for(tls_canary) as lab:
        address = await lab.address_of("api.test")
        answers = []
        for name in ("other.test", "evil.test", None):
            async with lab.tls(address, tls_canary.port, name) as stream:
                await stream.write(request(f"api.test:{tls_canary.port}"))
                answers.append(await read_all(stream))
        async with lab.tls(address, tls_canary.port, "api.test") as stream:
            await stream.write(request(f"other.test:{tls_canary.port}"))
            answers.append(await read_all(stream))

        assert [status_of(answer) for answer in answers] == [403] * 4
        assert len(lab.denials("tls")) == 3
    assert tls_canary.connections == 0


async def test_a_literal_address_with_an_allowed_server_name_is_refused(
    tls_canary: HttpServer,
) -> None:
    async with lab_for(tls_canary) as lab:
        async with lab.tls("127.0.0.1", tls_canary.port, "api.test") as stream:
            await stream.write(request(f"api.test:{tls_canary.port}"))
            answer = await read_all(stream)

        assert body_of(answer)["rule"] == "tls"
    assert tls_canary.connections == 0


async def test_a_host_allowed_on_one_port_is_refused_on_another(canary: HttpServer) -> None:
    async with lab_for(canary, "api.test:443") as lab:
        sock = await lab.connect("api.test", canary.port)
        answer = await sock.exchange(request(f"api.test:{canary.port}"))

        assert body_of(answer)["rule"] == "port"
        assert f"api.test:{canary.port}" in body_of(answer)["hint"]
    assert canary.connections == 0


# Protocols.


@pytest.mark.parametrize(
    "first",
    [
        b"\x00\x01\x02",
        b"EHLO me\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"get / http/1.1\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"\x16\x03\x01\x40\x01",
        b" GET / HTTP/1.1\r\n",
        b"\x05\x01\x00",
        b"A" * 20_000,
        b"\x16\x03\x01\x40\x00\x01" + b"\xff" * 16_384,
    ],
)
async def test_what_is_neither_http_nor_tls_is_refused(canary: HttpServer, first: bytes) -> None:
    async with lab_for(canary) as lab:
        sock = await lab.connect("api.test", canary.port)

        with pytest.raises(StreamReset):
            await sock.exchange(first)

        denied = lab.denials("connect") + lab.denials("tls")
        assert denied[0].rule == "protocol"
    assert canary.connections == 0


async def test_ssh_is_refused_in_its_own_words(canary: HttpServer) -> None:
    async with lab_for(canary) as lab:
        sock = await lab.connect("api.test", canary.port)
        answer = await sock.exchange(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n")

        assert answer.startswith(b"SSH-2.0-")
        assert lab.denials("connect")[0].rule == "protocol"
    assert canary.connections == 0


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        ("CONNECT api.test:{port} HTTP/1.1", [], 403),
        ("GET / HTTP/1.1", ["Connection: Upgrade", "Upgrade: websocket"], 400),
        ("TRACE / HTTP/1.1", [], 501),
        ("POST / HTTP/1.1", ["Content-Length: 5", "Transfer-Encoding: chunked"], 400),
        ("POST / HTTP/1.1", ["Content-Length: 5", "Content-Length: 6"], 400),
        ("POST / HTTP/1.1", ["Content-Length: +5"], 400),
        ("POST / HTTP/1.1", ["Transfer-Encoding: gzip, chunked"], 501),
        ("POST / HTTP/1.1", ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], 501),
        ("POST / HTTP/1.1", ["Transfer-Encoding : chunked"], 400),
        ("POST / HTTP/1.1", ["Transfer-Encoding: xchunked"], 501),
        ("POST / HTTP/1.0", ["Transfer-Encoding: chunked"], 400),
        ("GET / HTTP/1.1", ["Host: evil.test"], 400),
        ("GET / HTTP/1.1", ["X: a\0b"], 400),
        ("GET / HTTP/2.0", [], 505),
        ("GET / HTTP/1.1", ["Expect: 200-ok"], 417),
        ("GET / HTTP/1.1", ["X: " + "a" * 70_000], 431),
    ],
)
async def test_what_two_parsers_could_read_differently_is_refused(
    canary: HttpServer, line: str, headers: list[str], status: int
) -> None:
    async with lab_for(canary) as lab:
        sock = await lab.connect("api.test", canary.port)
        answer = await sock.exchange(
            request(f"api.test:{canary.port}", *headers, line=line.format(port=canary.port))
        )

        assert status_of(answer) == status
        assert lab.denials("request")
    assert canary.connections == 0


async def test_another_upgrade_is_answered_as_the_plain_request_that_it_is(
    canary: HttpServer,
) -> None:
    """Java and `curl --http2` offer h2c with every request in clear: nothing of it goes on."""
    offers = [
        ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"],
        ["HTTP2-Settings: AAMAAABk"],
        ["Connection: upgrade", "Upgrade: TLS/1.0, HTTP/2.0"],
    ]
    async with lab_for(canary) as lab:
        for offer in offers:
            sock = await lab.connect("api.test", canary.port)
            await sock.write(request(f"api.test:{canary.port}", *offer))
            assert status_of(await sock.read_response()) == 200

    names = {name.lower() for seen in canary.requests for name, _ in seen.headers}
    assert names == {"host"}


async def test_a_pipelined_request_does_not_ride_along(canary: HttpServer) -> None:
    async with lab_for(canary) as lab:
        sock = await lab.connect("api.test", canary.port)
        both = request(f"api.test:{canary.port}") + request("evil.test", line="POST /x HTTP/1.1")
        answer = await sock.exchange(both)

        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"connection: close" in answer.lower()
    assert [seen.path for seen in canary.requests] == ["/"]


async def test_hop_by_hop_headers_end_here(canary: HttpServer) -> None:
    async with lab_for(canary) as lab:
        sock = await lab.connect("api.test", canary.port)
        await sock.write(
            request(
                f"api.test:{canary.port}", "Connection: X-Private, content-length, host, close",
                "X-Private: 1", "Proxy-Authorization: Basic eDp5", "Keep-Alive: 1", "TE: trailers",
                "X-Kept: yes",
            )
        )  # fmt: skip
        await sock.read_all()

    names = {name.lower() for name, _ in canary.requests[0].headers}
    assert names == {"host", "x-kept"}


# Servers.


async def test_a_server_without_a_trusted_certificate_gets_nothing() -> None:
    for wrong in ({"untrusted": True}, {"expired": True}, {}):
        with http_server("api.test" if wrong else "another.test", **wrong) as server:
            async with lab_for(server) as lab:
                address = await lab.address_of("api.test")
                async with lab.tls(address, server.port, "api.test") as stream:
                    await stream.write(request(f"api.test:{server.port}", "Authorization: x"))
                    answer = await read_all(stream)

                assert status_of(answer) == 502
                assert b"127.0.0.1" not in answer
        assert server.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nraw",
        b"SSH-2.0-server\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 80_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"",
    ],
)
async def test_a_malformed_answer_is_a_bad_gateway(answer: bytes) -> None:
    async with scripted_server(answer) as server, lab_for(server) as lab:
        sock = await lab.connect("api.test", server.port)
        received = await sock.exchange(request(f"api.test:{server.port}"))

        assert status_of(received) == 502
        assert body_of(received)["type"] == "upstream_failed"


async def test_an_answer_that_breaks_off_never_looks_complete() -> None:
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
    async with scripted_server(cut) as server, lab_for(server) as lab:
        sock = await lab.connect("api.test", server.port)

        with pytest.raises(StreamReset):
            await sock.exchange(request(f"api.test:{server.port}"))

        assert [e.decision for e in lab.events if e.kind == "response"] == ["error"]


# The port.


@pytest.mark.parametrize(
    "frame",
    [
        encode_frame(FrameType.OPEN, 0, 0x80000001, b"\xc1"),
        encode_frame(FrameType.OPEN, 0, 1, b"\x80"),
        encode_frame(FrameType.OPEN, 0, 0x80000001, b"\x80"),
        encode_frame(FrameType.FUSE, 0, 0x80000001, b"x" * 16),
        encode_frame(FrameType.DATA, 1, 0x80000001, b"x"),
        struct.pack("<IBBHI", 9, 99, 0, 0, 0),
    ],
)
async def test_a_guest_that_breaks_the_ports_rules_loses_the_port(
    canary: HttpServer, frame: bytes
) -> None:
    async with lab_for(canary) as lab:
        lab.guest.port._transport.write(frame)  # the guest's end says what no agent would
        await until(lambda: lab.guest.lost and lab.failure)

        assert isinstance(lab.failure, GuestProtocolError)


async def test_connections_are_limited_and_come_back(
    canary: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SNIFF_TIMEOUT_S", PATIENCE_S)  # they say nothing
    async with lab_for(canary) as lab:
        address = await lab.address_of("api.test")
        socks = [await lab.guest.connect(address, canary.port) for _ in range(256)]
        with pytest.raises(StreamReset):
            await lab.guest.connect(address, canary.port)
        for sock in socks:
            sock.reset()
        await until(lambda: not lab.gateway.connections)
        sock = await lab.guest.connect(address, canary.port)
        await sock.write(request(f"api.test:{canary.port}", "Connection: close"))

        assert status_of(await sock.read_all()) == 200
        assert lab.denials("connect")[0].rule == "connection-limit"


async def test_what_cannot_be_recorded_does_not_happen(canary: HttpServer) -> None:
    async with egress_lab(
        allow=["api.test"],
        allow_addresses=[f"127.0.0.1:{canary.port}"],
        hosts={"api.test": ["127.0.0.1"]},
        max_log_bytes=400,
    ) as lab:
        sock = await lab.connect("api.test", canary.port)
        host = f"api.test:{canary.port}"
        answers = [
            await (await lab.connect("api.test", canary.port)).exchange(
                request(host, line=f"GET /{'x' * 300} HTTP/1.1")
            )
            for _ in range(2)
        ]
        sock.reset()

        assert [status_of(answer) for answer in answers] == [403, 403]
        assert lab.events[-1].kind == "log"
    assert canary.requests == []


async def _answer_or_reset(sock: object, data: bytes) -> bytes:
    try:
        return await sock.exchange(data)  # type: ignore[attr-defined]  # a GuestSocket
    except StreamReset:
        return b""


async def test_a_flood_of_connections_is_refused_one_by_one(
    canary: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five thousand OPENs in one write: the sandbox keeps its network, and memory stays bounded."""
    monkeypatch.setattr(connection, "SNIFF_TIMEOUT_S", PATIENCE_S)  # they say nothing
    async with lab_for(canary) as lab:
        address = await lab.address_of("api.test")
        body = msgspec.msgpack.encode({"op": "connect", "addr": address, "port": canary.port})
        numbers = range(0x9000_0000, 0x9000_0000 + 5000)
        lab.guest.ignored.update(numbers)
        frames = [encode_frame(FrameType.OPEN, 0, number, body) for number in numbers]
        lab.guest.port._transport.write(b"".join(frames))
        async with asyncio.timeout(PATIENCE_S):
            while len(lab.denials("connect")) < 5000 - 256:
                await asyncio.sleep(0.05)

        assert lab.gateway.connections == 256
        assert await lab.guest.resolve("api.test") == (0, address)
