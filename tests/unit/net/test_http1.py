"""HTTP/1.1's exchanges: taskvm.net.http1, http1guest (taskvm.net.http1guest) and taskvm.net.http1server.

WebSocket, server-sent events, and when a connection of taskvm.net.upstreams is used again. What is
common to all versions (taskvm.net.exchange) is in test_relay.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.support.egress_lab import HttpServer, Lab, egress_lab, http_server, scripted_server
from tests.support.h2_lab import fields, h2_client
from tests.support.tcp import tcp_server
from tests.support.waiting import PATIENCE_S

from taskvm.net import relay, upstreams
from taskvm.port import StreamReset
from taskvm.wire.websocket import acceptance_of

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="


@asynccontextmanager
async def sandbox(server: HttpServer) -> AsyncIterator[Lab]:
    async with egress_lab(
        allow=["api.test"],
        allow_addresses=[f"127.0.0.1:{server.port}"],
        hosts={"api.test": ["127.0.0.1"]},
    ) as lab:
        yield lab


@asynccontextmanager
async def raw_server(
    switch: bytes, *, early: bytes = b"", until_end: bool = True
) -> AsyncIterator[HttpServer]:
    """Answer an opening with `switch` and `early`, then echo in capitals what comes, to its end."""
    seen = HttpServer(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.connections += 1
        writer.write(switch + early)
        while until_end and (data := await reader.read(1000)):
            writer.write(data.upper())

    async with tcp_server(serve) as seen.port:
        yield seen


def opening(port: int) -> bytes:
    return (
        b"GET /chat HTTP/1.1\r\nHost: api.test:%d\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n\r\n" % (port, KEY)
    )


SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: " + acceptance_of(KEY) + b"\r\n\r\n"
)


async def test_a_websocket_passes_bytes_both_ways_to_its_end() -> None:
    async with raw_server(SWITCH, early=b"hello ") as server, sandbox(server) as lab:
        sock = await lab.connect("api.test", server.port)
        await sock.write(opening(server.port))
        received = b""
        while not received.endswith(b"hello "):
            received += await sock.read()
        for word in (b"one ", b"two "):
            await sock.write(word)
            while not received.endswith(word.upper()):
                received += await sock.read()
        sock.end()
        received += await sock.read_all()

        (ended,) = [e for e in lab.events if e.kind == "response"]
    head, _, frames = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101")
    assert b"sec-websocket-accept: " + acceptance_of(KEY).lower() in head.lower()
    assert frames == b"hello ONE TWO "
    assert (ended.status, ended.bytes_up, ended.bytes_down) == (101, 8, 14)


async def test_a_websocket_ends_with_its_server() -> None:
    async with raw_server(SWITCH, early=b"bye", until_end=False) as server, sandbox(server) as lab:
        sock = await lab.connect("api.test", server.port)
        await sock.write(opening(server.port))
        async with asyncio.timeout(PATIENCE_S):
            received = await sock.read_all()

    assert received.endswith(b"\r\n\r\nbye")


async def test_a_server_may_decline_a_websocket() -> None:
    refusal = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno"
    async with scripted_server(refusal) as server, sandbox(server) as lab:
        sock = await lab.connect("api.test", server.port)
        await sock.write(opening(server.port))

        assert (await sock.read_response()).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    "answer",
    [
        SWITCH.replace(acceptance_of(KEY), acceptance_of(b"another")),
        SWITCH.replace(b"Upgrade: websocket\r\n", b"Upgrade: h2c\r\n"),
        SWITCH.replace(b"Connection: Upgrade\r\n", b""),
    ],
)
async def test_another_switch_is_a_bad_gateway(answer: bytes) -> None:
    async with raw_server(answer) as server, sandbox(server) as lab:
        sock = await lab.connect("api.test", server.port)
        received = await sock.exchange(opening(server.port))

    assert received.startswith(b"HTTP/1.1 502")


async def test_a_websocket_that_is_silent_for_too_long_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay, "WEBSOCKET_TIMEOUT_S", 0.1)
    async with raw_server(SWITCH) as server, sandbox(server) as lab:
        sock = await lab.connect("api.test", server.port)
        await sock.write(opening(server.port))

        with pytest.raises(StreamReset):
            await sock.read_all()


async def test_an_event_arrives_before_the_next_one_is_sent() -> None:
    """Server-sent events, and every other answer that takes its time."""
    events = [b"data: %d\n\n" % number for number in range(3)]
    read = asyncio.Semaphore(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for event in events:
            writer.write(event)
            await read.acquire()

    async with tcp_server(serve) as port, sandbox(HttpServer(port)) as lab:
        sock = await lab.connect("api.test", port)
        await sock.write(f"GET / HTTP/1.1\r\nHost: api.test:{port}\r\n\r\n".encode())
        received = b""
        for event in events:
            async with asyncio.timeout(PATIENCE_S):
                while event not in received:
                    received += await sock.read()
            read.release()


async def test_a_server_that_has_ipv6_only_is_reached() -> None:
    """The guest has IPv4 only; what the host dials is the host's."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    async with (
        scripted_server(answer, address="::1") as server,
        egress_lab(
            allow=["six.test"],
            allow_addresses=[f"[::1]:{server.port}"],
            hosts={"six.test": ["::1"]},
        ) as lab,
    ):
        sock = await lab.connect("six.test", server.port)
        await sock.write(f"GET / HTTP/1.1\r\nHost: six.test:{server.port}\r\n\r\n".encode())
        received = await sock.read_response()

        (dialled,) = [e for e in lab.events if e.kind == "connect"]
    assert received.endswith(b"ok")
    assert dialled.address == "::1"


CONVERSATION = (
    b"POST /a HTTP/1.1\r\nHost: api.test:{port}\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n"
)


async def test_a_request_cut_anywhere_means_the_same() -> None:
    """Every place once, in two pieces that arrive apart."""
    with http_server() as server:
        async with sandbox(server) as lab:
            whole = CONVERSATION.replace(b"{port}", str(server.port).encode())
            for cut in range(1, len(whole)):
                sock = await lab.connect("api.test", server.port)
                await sock.write(whole[:cut])
                await asyncio.sleep(0)
                await sock.write(whole[cut:])
                assert (await sock.read_response()).endswith(b"hello world")
                sock.reset()

    assert {seen.body for seen in server.requests} == {b"hello world"}
    assert len(server.requests) == len(whole) - 1


async def test_a_request_that_ends_anywhere_is_never_complete_for_the_server() -> None:
    with http_server() as server:
        async with sandbox(server) as lab:
            whole = CONVERSATION.replace(b"{port}", str(server.port).encode())
            for end in range(1, len(whole), 3):
                sock = await lab.connect("api.test", server.port)
                await sock.write(whole[:end])
                sock.end()
                with contextlib.suppress(StreamReset):
                    await sock.read_all()

    assert [seen.body for seen in server.requests] == []


async def test_many_streams_share_a_few_connections_of_a_server_of_http1() -> None:
    with http_server("api.test") as server:
        async with sandbox(server) as lab, h2_client(lab, "api.test", server.port) as client:
            authority = f"api.test:{server.port}"
            numbers = [await client.send(fields(authority, f"/{n}")) for n in range(60)]
            answers = await client.finish(*numbers)

    assert [answer.status for answer in answers] == [200] * 60
    assert server.connections <= upstreams.MAX_CONNECTIONS
