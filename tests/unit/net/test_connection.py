"""A connection's first bytes: what it speaks, and whether it means whom it was made to."""

from __future__ import annotations

import asyncio
import random

import pytest
from tests.support.egress_lab import egress_lab, hello_with_ech, http_server, read_all
from tests.support.waiting import PATIENCE_S, until

from taskvm.net import connection
from taskvm.port import StreamReset


async def test_a_client_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SNIFF_TIMEOUT_S", 0.05)
    async with egress_lab(allow=["api.test"]) as lab:
        sock = await lab.connect("api.test", 22)

        with pytest.raises(StreamReset):
            await sock.read()

        assert lab.denials("connect")[0].reason == "unknown protocol: it said nothing in time"


async def test_a_denied_client_that_is_slow_to_begin_is_told_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "SNIFF_TIMEOUT_S", PATIENCE_S)
    loop = asyncio.get_running_loop()
    clock = loop.time
    async with egress_lab(allow=["api.test:443"]) as lab:
        sock = await lab.connect("api.test", 80)
        await until(lambda: lab.denials("connect"))
        monkeypatch.setattr(loop, "time", lambda: clock() + 9)

        answer = await sock.exchange(b"GET / HTTP/1.1\r\nHost: api.test\r\n\r\n")

    assert b"egress_denied" in answer


async def test_a_client_that_ends_at_once_is_recorded() -> None:
    async with egress_lab(allow=["api.test"]) as lab:
        sock = await lab.connect("api.test", 80)
        sock.end()

        with pytest.raises(StreamReset):
            await sock.read()

        assert lab.denials("connect")[0].rule == "protocol"


async def test_a_client_that_speaks_no_http_is_told_in_tls() -> None:
    with http_server("api.test") as server:
        async with egress_lab(allow=["api.test"], hosts={"api.test": ["127.0.0.1"]}) as lab:
            address = await lab.address_of("api.test")
            async with lab.tls(address, server.port, "api.test", alpn=["imap"]) as stream:
                await stream.write(b"GET / HTTP/1.1\r\nHost: api.test\r\n\r\n")
                answer = await read_all(stream)

        assert answer.startswith(b"HTTP/1.1 403")
        assert lab.denials("tls")[0].reason == "the client speaks no HTTP"
    assert server.connections == 0


async def test_an_encrypted_server_name_is_ignored_and_the_outer_one_counts() -> None:
    """GREASE, which browsers always send, and the real thing look alike: both go on as if without."""
    outer = {name: hello_with_ech(name) for name in (b"api.test", b"evil.test")}
    async with egress_lab(allow=["api.test"]) as lab:
        answered = {}
        for name, hello in outer.items():
            sock = await lab.connect("api.test", 443)
            await sock.write(hello)
            answered[name] = await sock.read()

        # Both get a ServerHello (22, and 2 inside); the wrong name its refusal inside TLS.
        assert all(data[0] == 22 and data[5] == 2 for data in answered.values())
        assert [denied.reason for denied in lab.denials("tls")] == [
            "the TLS handshake names another server than the connection was made to"
        ]


async def test_random_bytes_end_connections_and_nothing_else() -> None:
    """Two hundred connections of noise, some of it after a valid start; then one that works."""
    noise = random.Random(7)
    starts = [b"", b"GET / HTTP/1.1\r\nHost: ", b"\x16\x03\x01\x00\x50\x01\x00\x00\x4c", b"POST /"]
    with http_server() as server:
        async with egress_lab(
            allow=["api.test"],
            allow_addresses=[f"127.0.0.1:{server.port}"],
            hosts={"api.test": ["127.0.0.1"]},
        ) as lab:
            for number in range(200):
                sock = await lab.connect("api.test", server.port)
                await sock.write(starts[number % 4] + noise.randbytes(noise.randint(1, 200)))
                sock.end()
                try:
                    await sock.read_all()
                except StreamReset:
                    continue
            sock = await lab.connect("api.test", server.port)
            host = f"api.test:{server.port}"
            answer = await sock.exchange(
                f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
            )

            assert answer.startswith(b"HTTP/1.1 200")
            assert not [event for event in lab.events if event.reason == "internal error"]
    assert len(server.requests) == 1
