"""Attacks on the moment in which a secret changes: what is on its way then, and what streams on (taskvm.net.following).

Judged from what reached the servers, from all that the guest got, and from the record.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import pytest
from tests.support.egress_lab import (
    GuestSocket,
    Lab,
    egress_lab,
    http_server,
    scripted_server,
)
from tests.support.tcp import tcp_server
from tests.support.waiting import PATIENCE_S

from taskvm.egress.secret import Place, Secret
from taskvm.errors import UsageError
from taskvm.port import StreamReset
from taskvm.wire.hostname import IPAddress
from taskvm.wire.websocket import acceptance_of

VALUE = "sk-live-0123456789abcdef"
NEXT = "sk-next-fedcba9876543210"
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="


@asynccontextmanager
async def lab_for(port: int, places: Sequence[Place] = ()) -> AsyncIterator[Lab]:
    """A sandbox with a secret for a server in clear, which the secret's host names with its port."""
    async with egress_lab(
        allow=["api.test", "other.test"],
        allow_addresses=[f"127.0.0.1:{port}"],
        hosts={"api.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]},
        secrets=[Secret("KEY", VALUE, hosts=[f"api.test:{port}"], places=places)],
    ) as lab:
        yield lab
        assert VALUE.encode() not in b"".join(lab.lines)


def head(lab: Lab, port: int, line: str = "GET / HTTP/1.1", *more: str) -> bytes:
    lines = [line, f"Host: api.test:{port}", f"Authorization: {lab.secrets[0].placeholder}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


async def read_until(sock: GuestSocket, text: bytes) -> bytes:
    received = b""
    async with asyncio.timeout(PATIENCE_S):
        while text not in received:
            received += await sock.read()
    return received


class Stream:
    """A server whose answer goes on: it sends what the test says, when it says it."""

    def __init__(self, first: bytes) -> None:
        self.port = 0
        self.heads: list[bytes] = []
        self.received = b""
        self._first = first
        self._writers: list[asyncio.StreamWriter] = []

    async def say(self, text: bytes) -> None:
        self._writers[0].write(text)
        await self._writers[0].drain()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            self._writers.append(writer)
            writer.write(self._first)
            while data := await reader.read(1000):
                self.received += data


@asynccontextmanager
async def stream(first: bytes) -> AsyncIterator[Stream]:
    serving = Stream(first)
    async with tcp_server(serving.serve) as serving.port:
        yield serving


EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: begun\n\n"


# On its way.


async def test_a_secret_that_is_revoked_while_its_server_is_dialled_is_not_sent() -> None:
    """The request was judged, and allowed, before."""
    asked, go = asyncio.Event(), asyncio.Event()

    with http_server() as server:
        async with lab_for(server.port) as lab:
            known = lab.resolver.resolve

            async def resolve(host: str) -> Sequence[IPAddress]:
                asked.set()
                await go.wait()
                return await known(host)

            lab.resolver.resolve = resolve  # type: ignore[method-assign]  # a slow one
            sock = await lab.connect("api.test", server.port)
            await sock.write(head(lab, server.port))
            await asked.wait()
            lab.gateway.revoke_secret("KEY")
            go.set()

            with pytest.raises(StreamReset):
                await sock.read_all()
            assert [event.rule for event in lab.denials("connect")] == ["secret-revoked"]
            with pytest.raises(UsageError, match="no secret"):
                lab.gateway.revoke_secret("OTHER")
    assert server.requests == []


async def test_a_body_that_is_on_its_way_takes_no_revoked_value_along() -> None:
    async with (
        stream(b"HTTP/1.1 103 Early Hints\r\n\r\n") as server,
        lab_for(server.port, ["body"]) as lab,
    ):
        placeholder = lab.secrets[0].placeholder.encode()
        sock = await lab.connect("api.test", server.port)
        begin = head(lab, server.port, "POST / HTTP/1.1", "Transfer-Encoding: chunked")
        await sock.write(begin + b"3\r\none\r\n")
        await read_until(sock, b"103")
        lab.gateway.revoke_secret("KEY")
        with suppress(StreamReset):
            await sock.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(placeholder), placeholder))
            await sock.read_all()

    assert VALUE.encode() in server.heads[0]  # what was sent before was sent
    assert VALUE.encode() not in server.received


async def test_a_revoked_secret_cuts_its_hosts_and_no_others() -> None:
    async with stream(EVENTS) as server, lab_for(server.port) as lab:
        mine = await lab.connect("api.test", server.port)
        other = await lab.connect("other.test", server.port)
        await mine.write(head(lab, server.port))
        await other.write(b"GET / HTTP/1.1\r\nHost: other.test:%d\r\n\r\n" % server.port)
        for sock in (mine, other):
            await read_until(sock, b"begun")
        lab.gateway.revoke_secret("KEY")

        with pytest.raises(StreamReset):
            await mine.read_all()
        assert [(e.rule, e.host) for e in lab.denials("connect")] == [
            ("secret-revoked", "api.test")
        ]
        assert lab.gateway.connections == 1


async def test_a_host_that_a_secret_is_taken_from_is_cut_and_still_cannot_show_it() -> None:
    echo = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nit was %s" % VALUE.encode()
    async with scripted_server(echo) as echoing, stream(EVENTS) as server:
        addresses = [f"127.0.0.1:{port}" for port in (server.port, echoing.port)]
        hosts = [
            f"{name}.test:{port}"
            for name in ("api", "other")
            for port in (server.port, echoing.port)
        ]
        async with egress_lab(
            allow=["api.test", "other.test"], allow_addresses=addresses,
            hosts={"api.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]},
            secrets=[Secret("KEY", VALUE, hosts=hosts)],
        ) as lab:  # fmt: skip
            mine = await lab.connect("api.test", server.port)
            await mine.write(head(lab, server.port))
            kept = await lab.connect("other.test", server.port)
            await kept.write(b"GET / HTTP/1.1\r\nHost: other.test:%d\r\n\r\n" % server.port)
            for sock in (mine, kept):
                await read_until(sock, b"begun")
            for _ in range(2):
                narrowed = Secret("KEY", NEXT, hosts=[f"other.test:{server.port}"])
                lab.gateway.put_secret(narrowed)
            with pytest.raises(StreamReset):
                await mine.read_all()
            echoed = []
            for name in ("api", "other"):
                sock = await lab.connect(f"{name}.test", echoing.port)
                line = f"GET / HTTP/1.1\r\nHost: {name}.test:{echoing.port}\r\nConnection: close\r\n\r\n"
                echoed.append(await sock.exchange(line.encode()))
            refused = await lab.connect("api.test", server.port)
            await refused.write(head(lab, server.port))

            assert b" 403 " in await refused.read_response()
            assert [(e.rule, e.host) for e in lab.denials("connect")] == [
                ("secret-changed", "api.test")
            ]
        assert VALUE.encode() not in b"".join(echoed)
        assert echoed[0].count(lab.secrets[0].placeholder.encode()) == 1


async def test_a_body_that_is_on_its_way_gets_the_value_of_now() -> None:
    """A rotated value does not travel any more, and one that the guest knows by now is refused."""
    async with (
        stream(b"HTTP/1.1 103 Early Hints\r\n\r\n") as server,
        lab_for(server.port, ["body"]) as lab,
    ):
        placeholder = lab.secrets[0].placeholder.encode()
        sock = await lab.connect("api.test", server.port)
        begin = head(lab, server.port, "POST / HTTP/1.1", "Transfer-Encoding: chunked")
        await sock.write(begin + b"%x\r\n%s\r\n" % (10, placeholder[:10]))
        await read_until(sock, b"103")
        rotated = Secret("KEY", NEXT, hosts=[f"api.test:{server.port}"], places=["body"])
        lab.gateway.keyring.put(lab.policy, rotated)
        rest = placeholder[10:]
        await sock.write(b"%x\r\n%s\r\n" % (len(rest), rest))
        async with asyncio.timeout(PATIENCE_S):
            while NEXT.encode() not in server.received:
                await asyncio.sleep(0.01)
        with suppress(StreamReset):
            await sock.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(VALUE), VALUE.encode()))
            await sock.read_all()

        assert [event.secrets for event in lab.denials("secret")] == [("KEY",)]
    assert VALUE.encode() not in server.received


# What streams on.


@pytest.mark.parametrize("name", ["KEY", "MORE"])
async def test_a_stream_that_was_open_before_does_not_show_the_new_value(name: str) -> None:
    """Rotated or added: a guest could keep a stream open, and have the server repeat there what it got elsewhere."""
    async with stream(EVENTS) as server, lab_for(server.port) as lab:
        sock = await lab.connect("api.test", server.port)
        await sock.write(head(lab, server.port))
        await read_until(sock, b"begun")
        added = Secret(name, NEXT, hosts=[f"api.test:{server.port}"])
        placeholder = lab.gateway.keyring.put(lab.policy, added)
        await server.say(f"data: was {VALUE} is {NEXT[:7]}".encode())
        await server.say(f"{NEXT[7:]}\n\ndata: over\n\n".encode())
        shown = await read_until(sock, b"over")

        assert [event.rule for event in lab.denials("secret")][:1] == ["reflection"]
    assert placeholder.encode() in shown
    assert VALUE.encode() not in shown
    assert NEXT.encode() not in shown


async def test_the_first_secret_of_a_host_is_kept_from_a_stream_of_it_too() -> None:
    async with (
        stream(EVENTS) as server,
        egress_lab(
            allow=["api.test"],
            allow_addresses=[f"127.0.0.1:{server.port}"],
            hosts={"api.test": ["127.0.0.1"]},
        ) as lab,
    ):
        sock = await lab.connect("api.test", server.port)
        await sock.write(b"GET / HTTP/1.1\r\nHost: api.test:%d\r\n\r\n" % server.port)
        await read_until(sock, b"begun")
        lab.gateway.keyring.put(lab.policy, Secret("KEY", VALUE, hosts=[f"api.test:{server.port}"]))
        await server.say(f"data: {VALUE}\n\ndata: over\n\n".encode())
        shown = await read_until(sock, b"over")

    assert VALUE.encode() not in shown


async def test_credentials_of_one_request_are_not_shown_by_the_next() -> None:
    """A page of what was asked before has them in base64, with whatever name the guest chose."""
    for name in ("", "u", "us", "use"):
        real = base64.b64encode(f"{name}:{VALUE}:x".encode())
        page = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(real), real)
        async with scripted_server(page) as server, lab_for(server.port) as lab:
            sock = await lab.connect("api.test", server.port)
            shown = await sock.exchange(
                head(lab, server.port, "GET / HTTP/1.1", "Connection: close")
            )

            assert lab.secrets[0].placeholder.encode() in shown
        for part in (real[4:-8][at : at + 10] for at in range(len(real) - 22)):
            assert part not in shown


# WebSocket: the opening is looked at, messages are not (docs/protocols.md).


async def test_a_websockets_opening_is_looked_at_and_its_messages_are_not() -> None:
    """The value is in the request, not in the answer to it; a placeholder in a message stays one."""
    switch = (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %s\r\nX-Echo: %s\r\n\r\n" % (acceptance_of(KEY), VALUE.encode())
    )
    asks = [
        "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {KEY.decode()}",
    ]  # fmt: skip
    async with stream(switch) as server, lab_for(server.port) as lab:
        placeholder = lab.secrets[0].placeholder.encode()
        sock = await lab.connect("api.test", server.port)
        await sock.write(head(lab, server.port, "GET / HTTP/1.1", *asks))
        opened = await read_until(sock, b"\r\n\r\n")
        await sock.write(b"\x81" + placeholder)
        async with asyncio.timeout(PATIENCE_S):
            while placeholder not in server.received:
                await asyncio.sleep(0.01)

    assert f"Authorization: {VALUE}".encode() in server.heads[0]
    assert VALUE.encode() not in opened
    assert b"X-Echo: " + placeholder in opened


async def test_a_second_request_does_not_ride_in_a_websocket_that_was_declined() -> None:
    """What follows the opening is a request of its own, and judged."""
    with http_server() as server:
        async with lab_for(server.port) as lab:
            sock = await lab.connect("api.test", server.port)
            asks = [
                "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
                f"Sec-WebSocket-Key: {KEY.decode()}",
            ]  # fmt: skip
            await sock.write(head(lab, server.port, "GET /ws HTTP/1.1", *asks))
            await read_until(sock, b"\r\n0\r\n\r\n")
            await sock.exchange(b"GET /x HTTP/1.1\r\nHost: other.test:%d\r\n\r\n" % server.port)
    assert [seen.path for seen in server.requests] == ["/ws"]
