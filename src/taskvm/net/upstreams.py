"""The servers' connections of one guest connection: dialled when needed, recorded, used again.

Rule 1: they serve this guest connection alone and end with it: nothing is shared between sandboxes,
        nor between connections of one.
Rule 2: a guest that speaks HTTP/1.1 has one at a time, which is also spoken to in HTTP/1.1. One that
        speaks HTTP/2 has one of HTTP/2, or MAX_CONNECTIONS where the server chose HTTP/1.1.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING

from taskvm.errors import UpstreamError
from taskvm.net.egress import UNRECORDED, Refusal, Session
from taskvm.net.exchange import ServerExchange
from taskvm.net.http1server import Http1Server
from taskvm.net.upstream import H1, H2, AddressRefused, Upstream

if TYPE_CHECKING:
    from taskvm.net.http2server import Http2Server

MAX_CONNECTIONS = 16  # of HTTP/1.1, for one guest connection of HTTP/2


class ServerConnections:
    """Opens exchanges with the origin. `tasks`, of the guest's HTTP/2 connection, lets HTTP/2 be chosen."""

    def __init__(self, session: Session, tasks: asyncio.TaskGroup | None = None) -> None:
        self._session = session
        self._tasks = tasks
        self._idle: list[Http1Server] = []
        self._fresh: Http1Server | None = None  # dialled to learn what the server speaks
        self._shared: Http2Server | None = None
        self._running: list[asyncio.Task[None]] = []
        self._protocol: str | None = H1 if tasks is None else None
        self._choosing = asyncio.Lock()
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)

    async def open(self) -> ServerExchange:
        """Return an exchange that nothing was sent on. Raises Refusal."""
        if self._protocol != H1:
            async with self._choosing:  # many requests come at once: the first one dials
                exchange = await self._open_shared()
            if exchange is not None:
                return exchange
        await self._room.acquire()
        try:
            return (await self._take_idle()).exchange(self._put_back)
        except BaseException:
            self._room.release()
            raise

    def close(self) -> None:
        """Drop all of them."""
        for server in [*self._idle, *([self._fresh] if self._fresh else [])]:
            server.abort()
        self._idle.clear()
        for task in self._running:
            task.cancel()

    async def _open_shared(self) -> ServerExchange | None:
        if self._protocol == H1:
            return None
        if self._shared is None or not self._shared.takes_more:
            upstream = await self._dial((H2, H1))
            self._protocol = upstream.protocol
            if upstream.protocol != H2:
                self._fresh = Http1Server(upstream, self._session.origin)
                return None
            from taskvm.net.http2server import Http2Server  # with h2, as a guest of HTTP/2 has it
            from taskvm.wire.http2 import CONNECTION_WINDOW

            assert self._tasks is not None, "only a guest of HTTP/2 is offered it"
            held = ExitStack()
            in_flight = self._session.egress.in_flight
            window = held.enter_context(in_flight.window(CONNECTION_WINDOW))
            self._shared = Http2Server(upstream, self._session.origin, window)
            running = self._tasks.create_task(self._shared.run())
            # Not in the task itself: one that is cancelled before it starts runs none of its code.
            held.callback(upstream.abort)
            running.add_done_callback(lambda _: held.close())
            self._running.append(running)
        return await self._shared.exchange()

    async def _take_idle(self) -> Http1Server:
        fresh, self._fresh = self._fresh, None
        if fresh is not None:
            return fresh  # not asked whether it is quiet: TLS 1.3 tickets may lie in it
        while self._idle:
            server = self._idle.pop()
            if server.is_quiet():
                return server
            server.abort()
        return Http1Server(await self._dial((H1,)), self._session.origin)

    def _put_back(self, server: Http1Server, reusable: bool) -> None:
        self._room.release()
        if reusable:
            self._idle.append(server)
        else:
            server.abort()

    async def _dial(self, protocols: tuple[str, ...]) -> Upstream:
        session = self._session
        try:
            upstream = await session.egress.dialer.connect(session.origin, protocols)
        except AddressRefused as error:
            raise refuse_address(session, error) from error
        except UpstreamError as error:
            raise refuse_unreachable(session, error) from error
        if not session.record("connect", "allow", rule=upstream.rule, address=upstream.address):
            upstream.abort()
            raise Refusal.of(UNRECORDED)
        return upstream


def refuse_address(session: Session, error: AddressRefused) -> Refusal:
    """Record that a name's address is not allowed; return what the guest is told."""
    decision, address = error.decision, str(error.address)
    session.record("connect", "deny", rule=decision.rule, reason=decision.reason, address=address)
    return Refusal.of(decision)


def refuse_unreachable(session: Session, error: UpstreamError) -> Refusal:
    """Record that the server cannot be reached; return what the guest is told."""
    session.record("connect", "error", reason=str(error))
    return Refusal(502, "upstream_failed", "", error.cause)
