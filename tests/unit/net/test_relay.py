"""Carrying messages: streaming both ways, back-pressure, endings, and what servers do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.egress_lab import (
    HttpServer,
    Lab,
    egress_lab,
    scripted_server,
)
from tests.support.tcp import tcp_server
from tests.support.waiting import PATIENCE_S, until, until_settled

from taskvm.net import http1guest, relay
from taskvm.port import StreamReset


@asynccontextmanager
async def sandbox(server: HttpServer) -> AsyncIterator[Lab]:
    """A sandbox that may reach `api.test`, where the server listens."""
    async with egress_lab(
        allow=["api.test"],
        allow_addresses=[f"127.0.0.1:{server.port}"],
        hosts={"api.test": ["127.0.0.1"]},
    ) as lab:
        yield lab


async def test_an_expectation_is_answered_by_the_server_itself() -> None:
    async with (
        scripted_server(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        ) as server,
        sandbox(server) as lab,
    ):
        sock = await lab.connect("api.test", server.port)
        head = f"POST / HTTP/1.1\r\nHost: api.test:{server.port}\r\nContent-Length: 4\r\n"
        await sock.write(f"{head}Expect: 100-continue\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE_S):
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


@asynccontextmanager
async def hasty_server() -> AsyncIterator[HttpServer]:
    """Answers one request on each connection, and closes it when another comes."""
    seen = HttpServer(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            await reader.readuntil(b"\r\n\r\n")

    async with tcp_server(serve) as seen.port:
        yield seen


@pytest.mark.parametrize(
    ("line", "status", "connections"),
    [("GET /", b"200", 2), ("DELETE /x", b"200", 2), ("POST /", b"502", 1)],
)
async def test_a_server_that_closes_what_was_idle_is_asked_anew(
    line: str, status: bytes, connections: int
) -> None:
    """Once more, on a connection of its own; not where twice may be too often."""
    async with hasty_server() as server, sandbox(server) as lab:
        sock = await lab.connect("api.test", server.port)
        host = f"Host: api.test:{server.port}\r\n"
        await sock.write(f"GET / HTTP/1.1\r\n{host}\r\n".encode())
        assert b" 200 " in await sock.read_response()
        await sock.write(f"{line} HTTP/1.1\r\n{host}Content-Length: 0\r\n\r\n".encode())
        answer = await sock.read_response()

        assert answer.split()[1] == status
        assert server.connections == connections
        assert len([event for event in lab.events if event.kind == "connect"]) == connections


async def test_a_final_answer_before_the_end_of_the_upload_is_delivered() -> None:
    async with (
        scripted_server(
            b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig", close=False
        ) as server,
        sandbox(server) as lab,
    ):
        sock = await lab.connect("api.test", server.port)
        head = f"POST / HTTP/1.1\r\nHost: api.test:{server.port}\r\nContent-Length: 99999\r\n\r\n"
        async with asyncio.timeout(PATIENCE_S):
            answer = await sock.exchange(head.encode() + b"x" * 1000)

    assert answer.startswith(b"HTTP/1.1 413")
    assert answer.endswith(b"big")


async def test_a_guest_that_does_not_read_holds_the_server_back() -> None:
    """Memory is bounded: the server is stopped by what the guest and the kernel hold."""
    tcp = Path("/proc/sys/net/ipv4")
    kernel_holds = sum(
        int((tcp / name).read_text().split()[2]) for name in ("tcp_rmem", "tcp_wmem")
    )
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

    async with tcp_server(serve) as port, sandbox(HttpServer(port)) as lab:
        sock = await lab.connect("api.test", port)
        await sock.write(f"GET / HTTP/1.1\r\nHost: api.test:{port}\r\n\r\n".encode())
        stalled = await until_settled(lambda: sent)

        assert stalled < 2_000_000 + kernel_holds
        sock.reset()
        await until(lambda: not lab.gateway.connections)


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


async def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "STALL_TIMEOUT_S", 0.1)
    async with scripted_server(b"", close=False) as server, sandbox(server) as lab:
        sock = await lab.connect("api.test", server.port)
        answer = await sock.exchange(
            f"GET / HTTP/1.1\r\nHost: api.test:{server.port}\r\n\r\n".encode()
        )

    assert answer.startswith(b"HTTP/1.1 502")
    assert b"nothing moved for too long" in answer


async def test_a_head_that_never_ends_closes_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http1guest, "HEAD_TIMEOUT_S", 0.1)
    async with egress_lab(allow=["api.test"]) as lab:
        sock = await lab.connect("api.test", 80)

        assert await sock.exchange(b"GET / HTTP/1.1\r\nX-Slow: ") == b""


async def test_a_guest_that_resets_ends_the_exchange_with_the_server() -> None:
    async with (
        scripted_server(b"HTTP/1.1 200 OK\r\n", close=False) as server,
        sandbox(server) as lab,
    ):
        sock = await lab.connect("api.test", server.port)
        await sock.write(f"GET / HTTP/1.1\r\nHost: api.test:{server.port}\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            while not server.requests:
                await asyncio.sleep(0.01)
            sock.reset()
            while lab.gateway.connections:
                await asyncio.sleep(0.01)

        ended = [event for event in lab.events if event.kind == "response"]
        assert [event.decision for event in ended] == ["error"]


async def test_a_request_that_breaks_off_is_not_completed_for_the_server() -> None:
    async with scripted_server(b"", close=False) as server, sandbox(server) as lab:
        sock = await lab.connect("api.test", server.port)
        head = f"POST / HTTP/1.1\r\nHost: api.test:{server.port}\r\nTransfer-Encoding: chunked\r\n"
        await sock.write(head.encode() + b"\r\n5\r\nhello\r\nnonsense\r\n")

        with pytest.raises(StreamReset):
            await sock.read_all()

    assert b"0\r\n\r\n" not in server.requests[0].body
