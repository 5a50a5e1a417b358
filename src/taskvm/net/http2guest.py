"""The guest's side of HTTP/2: each stream of its connection is a request for the relay.

Rule: what is refused is answered on its stream, as in HTTP/1.1; what is no HTTP/2 ends the
connection, recorded.
"""

from __future__ import annotations

import asyncio

import h2.events
from h2.errors import ErrorCodes

from taskvm.net.egress import CROWDED, Refusal, Session
from taskvm.net.http2 import Http2Link, Http2Stream
from taskvm.net.relay import Relay
from taskvm.net.streams import ByteStream
from taskvm.net.upstreams import ServerConnections
from taskvm.wire.http2 import Http2Error, read_request, render_response
from taskvm.wire.message import Asked, Header, ResponseHead

IDLE_TIMEOUT_S = 120.0  # without a request


class Http2Guest:
    """Serves a guest's connection of HTTP/2. With `denied`, each request gets that for an answer."""

    def __init__(
        self, session: Session, stream: ByteStream, denied: Refusal | None, window: int
    ) -> None:
        self._session = session
        self._denied = denied
        self._link = Http2Link(stream, on_request=self._begin, window=window)
        self._tasks: asyncio.TaskGroup | None = None
        self._relay: Relay | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve requests until the connection ends. Raises OSError when the guest is gone."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                upstreams = ServerConnections(self._session, self._tasks)
                self._relay = Relay(self._session, upstreams, self._denied)
                try:
                    await self._link.run(IDLE_TIMEOUT_S)
                except Http2Error as error:
                    self._session.record("request", "deny", rule="http", reason=error.reason)
                finally:
                    upstreams.close()
                    for task in list(self._serving):
                        task.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    def _begin(self, stream: Http2Stream, event: h2.events.RequestReceived) -> None:
        assert self._tasks is not None, "the link is run inside the group"
        ended = event.stream_ended is not None
        asked = read_request(event.headers, self._session.origin, ended=ended)
        if not self._session.egress.in_flight.take(asked):
            self._session.record("request", "deny", rule=CROWDED.rule, reason=CROWDED.reason)
            # Nothing was done with it: a client may ask again (RFC 9113 section 8.7).
            stream.release(ErrorCodes.REFUSED_STREAM)
            return
        exchange = _GuestExchange(stream, asked)
        task = self._tasks.create_task(self._serve(exchange))
        self._serving.add(task)
        # Not in the task itself: one that is cancelled before it starts runs none of its code.
        task.add_done_callback(lambda task: self._served(task, exchange))
        stream.on_fail = task.cancel

    async def _serve(self, exchange: _GuestExchange) -> None:
        assert self._relay is not None, "made before the link runs"
        try:
            await self._relay.serve(exchange)
        except OSError:
            exchange.break_off()  # the stream was reset, or the guest took no answer

    def _served(self, task: asyncio.Task[None], exchange: _GuestExchange) -> None:
        self._serving.discard(task)
        exchange.release()
        self._session.egress.in_flight.give_back(exchange.asked)


class _GuestExchange:
    """One request of the guest."""

    def __init__(self, stream: Http2Stream, asked: Asked) -> None:
        self._stream = stream
        self._asked = asked

    @property
    def asked(self) -> Asked:
        return self._asked

    @property
    def trailer(self) -> list[Header]:
        return self._stream.trailer

    async def read(self) -> bytes:
        return await self._stream.read()

    async def send_head(self, head: ResponseHead) -> None:
        await self._stream.wait_room()
        self._stream.write_head(render_response(head), end=head.ended)

    async def send(self, data: bytes) -> None:
        await self._stream.write(data)

    async def end(self, trailer: list[Header]) -> None:
        self._stream.write_end(trailer)

    def close_after(self) -> None:
        pass  # the other streams go on

    def break_off(self, code: int | None = None) -> None:
        self._stream.release(ErrorCodes.INTERNAL_ERROR if code is None else code)

    def release(self) -> None:
        """Let go of the stream; a body that the answer did not need is not read (RFC 9113, 8.1)."""
        self._stream.release(
            ErrorCodes.NO_ERROR if self._stream.sent_end else ErrorCodes.INTERNAL_ERROR
        )
