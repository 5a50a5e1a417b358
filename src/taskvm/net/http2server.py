"""A server's side of HTTP/2: one connection that all requests of one guest connection share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import h2.events
from h2.errors import ErrorCodes

from taskvm.errors import UpstreamError
from taskvm.net.exchange import StreamEnded
from taskvm.net.http2 import Http2Excess, Http2Link, Http2Reset, Http2Stream
from taskvm.net.upstream import Upstream
from taskvm.wire.http2 import MAX_STREAMS, Http2Error, read_response, render_request
from taskvm.wire.message import Header, HttpRefused, Origin, RequestHead, ResponseHead


class Http2Server:
    """The connection. `run` carries it; exchanges wait while the server takes no more streams."""

    def __init__(self, upstream: Upstream, origin: Origin, window: int) -> None:
        self.origin = origin
        self.link = Http2Link(upstream.stream, window=window)
        self.failure = "the server's connection broke off"
        self._upstream = upstream
        self._open = 0
        self._room = asyncio.Event()
        self.link.on_change = self._room.set

    async def run(self) -> None:
        """Carry the connection until it ends."""
        try:
            await self.link.run()
        except Http2Error:
            self.failure = "the server does not speak valid HTTP/2"
        except OSError:
            pass  # its streams have been told
        finally:
            self._upstream.abort()
            self._room.set()

    @property
    def takes_more(self) -> bool:
        """Whether new exchanges can begin here."""
        return not self.link.going_away

    async def exchange(self) -> Http2ServerExchange:
        """Return an exchange, as soon as the server lets there be one more."""
        while self._open >= min(self.link.max_streams, MAX_STREAMS) and self.takes_more:
            self._room.clear()
            await self._room.wait()
        self._open += 1
        return Http2ServerExchange(self)

    def give_back(self) -> None:
        """Let another exchange begin."""
        self._open -= 1
        self._room.set()


class Http2ServerExchange:
    """One request to a server."""

    def __init__(self, server: Http2Server) -> None:
        self._server = server
        self._stream: Http2Stream | None = None
        self._released = False

    @property
    def trailer(self) -> list[Header]:
        return self._opened.trailer

    async def send_head(self, head: RequestHead) -> None:
        fields = render_request(head, self._server.origin)
        with self._errors("send the request"):
            await self._server.link.wait_room()
            self._stream = self._server.link.open_stream(fields, end=not head.has_body)

    async def send(self, data: bytes) -> None:
        with self._errors("send the request"):
            await self._opened.write(data)

    async def end(self, trailer: list[Header]) -> None:
        with self._errors("send the request"):
            self._opened.write_end(trailer)

    async def read_head(self) -> ResponseHead:
        stream = self._opened
        with self._errors("read the response"):
            while not stream.heads:
                if stream.error is not None:
                    raise stream.error
                await stream.wait_change()
        event = stream.heads.popleft()
        ended = isinstance(event, h2.events.ResponseReceived) and event.stream_ended is not None
        try:
            return read_response(event.headers, ended=ended)
        except HttpRefused as refused:
            raise UpstreamError("read the response", refused.reason) from refused

    async def read(self) -> bytes:
        with self._errors("read the response"):
            return await self._opened.read()

    def release(self, *, complete: bool) -> None:
        if self._released:
            return
        self._released = True
        if self._stream is not None:
            self._stream.release(ErrorCodes.NO_ERROR if complete else ErrorCodes.CANCEL)
        self._server.give_back()

    @property
    def _opened(self) -> Http2Stream:
        assert self._stream is not None, "the head is sent first"
        return self._stream

    @contextlib.contextmanager
    def _errors(self, operation: str) -> Iterator[None]:
        try:
            yield
        except Http2Reset as error:
            raise StreamEnded(operation, error.code) from error
        except Http2Excess as error:
            raise UpstreamError(operation, "the server's response has too many fields") from error
        except TimeoutError:
            raise  # the stall timer's
        except OSError as error:
            raise UpstreamError(operation, self._server.failure) from error
