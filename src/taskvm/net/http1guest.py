"""The guest's side of HTTP/1.1: its connection, one request after the other.

Rule: what a guest sends before its answer is complete (pipelining) is not served, and that answer
says `Connection: close`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import h11

from taskvm.errors import UpstreamError
from taskvm.net.egress import Refusal, Session
from taskvm.net.http1 import Http1Body, next_event
from taskvm.net.relay import Relay
from taskvm.net.streams import ByteStream
from taskvm.net.upstreams import ServerConnections
from taskvm.wire.http1 import read_request, render_informational, render_response
from taskvm.wire.message import MAX_HEAD, Asked, Header, HttpRefused, RequestHead, ResponseHead

HEAD_TIMEOUT_S = 30.0  # for a request's head, from its first wait
IDLE_TIMEOUT_S = 120.0  # between requests

_NO_REQUEST = Asked(b"", b"", HttpRefused(400, ""))


class Http1Guest:
    """Serves a guest's connection, one request after the other."""

    def __init__(self, session: Session, stream: ByteStream, denied: Refusal | None = None) -> None:
        self._upstreams = ServerConnections(session)
        self._relay = Relay(session, self._upstreams, denied)
        self._stream = stream
        self._h11 = h11.Connection(h11.SERVER, MAX_HEAD)

    async def run(self) -> None:
        """Serve requests until either side closes or one is refused.

        Raises OSError when the guest is gone.
        """
        try:
            wait_s = HEAD_TIMEOUT_S
            while (exchange := await self._next_exchange(wait_s)) is not None:
                await self._serve(exchange)
                if not self._prepare_next():
                    return
                wait_s = IDLE_TIMEOUT_S
        finally:
            self._upstreams.close()

    async def _serve(self, exchange: _GuestExchange) -> None:
        in_flight = self._relay.session.egress.in_flight
        if not in_flight.take(exchange.asked):
            await self._relay.refuse_crowded(exchange)
            return
        try:
            await self._relay.serve(exchange)
        finally:
            in_flight.give_back(exchange.asked)

    async def _next_exchange(self, wait_s: float) -> _GuestExchange | None:
        exchange = _GuestExchange(self._h11, self._stream, _NO_REQUEST)
        try:
            async with asyncio.timeout(wait_s):
                event = await next_event(self._h11, self._stream)
        except TimeoutError:
            return None
        except h11.RemoteProtocolError as error:
            # h11's own words quote the guest's bytes: they stay out of the log and the answer.
            await self._relay.refuse_unread(exchange, error.error_status_hint)
            return None
        if not isinstance(event, h11.Request):
            return None
        session = self._relay.session
        asked = read_request(event, session.origin)
        if isinstance(asked.head, RequestHead) and not asked.head.has_body:
            self._h11.next_event()  # its end, at once
        return _GuestExchange(
            self._h11, self._stream, asked, lambda: _record_pipelined(self._relay)
        )

    def _prepare_next(self) -> bool:
        if (self._h11.our_state, self._h11.their_state) != (h11.DONE, h11.DONE):
            return False
        self._h11.start_next_cycle()
        return True


class _GuestExchange(Http1Body):
    """One request of the guest."""

    def __init__(
        self,
        connection: h11.Connection,
        stream: ByteStream,
        asked: Asked,
        on_pipelined: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(connection, stream)
        self._asked = asked
        self._on_pipelined = on_pipelined
        self._chunked = False
        self._close = False

    @property
    def asked(self) -> Asked:
        return self._asked

    async def read(self) -> bytes:
        try:
            return await self.read_body()
        except h11.RemoteProtocolError as error:
            raise ConnectionResetError("the guest's request broke off") from error

    async def send_head(self, head: ResponseHead) -> None:
        if head.status == 101:
            await self._write(render_informational(head))
            self.switch()
        elif head.status < 200:
            if self._h11.their_http_version == b"1.1":
                await self._write(render_informational(head))
        else:
            await self._write(render_response(head, close=self._closes()))
            self._chunked = not any(name.lower() == b"content-length" for name, _ in head.headers)

    async def send(self, data: bytes) -> None:
        if self._switched:
            await self._stream.write(data)
        else:
            await self._write(h11.Data(data=data))

    async def end(self, trailer: list[Header]) -> None:
        if self._switched:
            await self._stream.end()
            return
        may_follow = self._chunked and self._h11.their_http_version == b"1.1"
        await self._write(h11.EndOfMessage(headers=trailer if may_follow else []))

    def close_after(self) -> None:
        self._close = True

    def break_off(self, code: int | None = None) -> None:
        del code
        self._stream.abort()

    def _closes(self) -> bool:
        pipelined = self._h11.their_state is h11.DONE and bool(self._h11.trailing_data[0])
        if pipelined:
            # A client that pipelines asks again (RFC 9112 section 9.3.2).
            self._on_pipelined()
        return pipelined or self._close or self._h11.they_are_waiting_for_100_continue

    async def _write(self, event: h11.Event) -> None:
        try:
            data = self._h11.send(event)
        except h11.LocalProtocolError as error:
            if self._close:  # a refusal in the middle of something that no answer fits
                raise ConnectionResetError("no answer fits") from error
            cause = "the server's message is malformed"
            raise UpstreamError("relay the response", cause) from error
        if data:
            await self._stream.write(data)


def _record_pipelined(relay: Relay) -> None:
    relay.session.record("request", "deny", rule="http", reason="a request was pipelined")
