"""A server's side of HTTP/1.1: its connection, for one exchange after the other.

Rule: it is used again only when both sides of the last exchange were complete and nothing came since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import h11

from taskvm.errors import UpstreamError
from taskvm.net.exchange import Unanswered
from taskvm.net.http1 import Http1Body, next_event
from taskvm.net.streams import ByteStream
from taskvm.net.upstream import Upstream
from taskvm.wire.http1 import read_response, render_request
from taskvm.wire.message import (
    MAX_HEAD,
    Header,
    HttpRefused,
    Origin,
    RequestHead,
    ResponseHead,
)


class Http1Server:
    """A connection to a server, for one exchange after the other."""

    def __init__(self, upstream: Upstream, origin: Origin) -> None:
        self._upstream = upstream
        self._origin = origin
        self._h11 = h11.Connection(h11.CLIENT, MAX_HEAD)
        self._was_used = False

    def is_quiet(self) -> bool:
        """Say whether it can take another request."""
        return self._upstream.is_quiet()

    def exchange(self, on_release: Callable[[Http1Server, bool], None]) -> Http1ServerExchange:
        """Begin an exchange; `on_release` gets the connection back, and whether it can be used again."""
        return Http1ServerExchange(self, self._h11, self._upstream.stream, on_release)

    @property
    def was_used(self) -> bool:
        """Whether it has served an exchange."""
        return self._was_used

    @property
    def origin(self) -> Origin:
        """Whom it is connected to."""
        return self._origin

    def prepare_next(self) -> bool:
        """Say whether the last exchange was complete, and get ready for another."""
        if (self._h11.our_state, self._h11.their_state) != (h11.DONE, h11.DONE):
            return False
        if any(
            self._h11.trailing_data
        ):  # more than was asked for, or the end, has been read already
            return False
        self._h11.start_next_cycle()
        self._was_used = True
        return True

    def abort(self) -> None:
        """Close it."""
        self._upstream.abort()


class Http1ServerExchange(Http1Body):
    """One request to a server."""

    def __init__(
        self,
        server: Http1Server,
        connection: h11.Connection,
        stream: ByteStream,
        on_release: Callable[[Http1Server, bool], None],
    ) -> None:
        super().__init__(connection, stream)
        self._server: Http1Server | None = server
        self._origin = server.origin
        self._was_used = server.was_used
        self._answered = False
        self._on_release = on_release
        self._request = RequestHead(b"", b"", [])

    async def send_head(self, head: RequestHead) -> None:
        self._request = head
        data = self._h11.send(render_request(head, self._origin)) or b""
        if not head.has_body:
            data += self._h11.send(h11.EndOfMessage()) or b""
        with self._errors("send the request"):
            await self._stream.write(data)

    async def send(self, data: bytes) -> None:
        with self._errors("send the request"):
            await self._stream.write(
                data if self._switched else self._rendered(h11.Data(data=data))
            )

    async def end(self, trailer: list[Header]) -> None:
        with self._errors("send the request"):
            if self._switched:
                await self._stream.end()
            else:
                chunked = not any(k.lower() == b"content-length" for k, _ in self._request.headers)
                fields = trailer if chunked else []
                await self._stream.write(self._rendered(h11.EndOfMessage(headers=fields)))

    async def read_head(self) -> ResponseHead:
        with self._errors("read the response"):
            event = await next_event(self._h11, self._stream)
        self._answered = True
        if not isinstance(event, h11.Response | h11.InformationalResponse):
            raise UpstreamError("read the response", "the server closed without an answer")
        try:
            head = read_response(event, self._request)
        except HttpRefused as refused:
            raise UpstreamError("read the response", refused.reason) from refused
        if head.status == 101:
            self.switch()
        return head

    async def read(self) -> bytes:
        with self._errors("read the response"):
            return await self.read_body()

    def release(self, *, complete: bool) -> None:
        server, self._server = self._server, None
        if server is not None:
            self._on_release(server, complete and server.prepare_next())

    def _rendered(self, event: h11.Event) -> bytes:
        return self._h11.send(event) or b""

    @contextmanager
    def _errors(self, operation: str) -> Iterator[None]:
        """Map what goes wrong with the server's connection to UpstreamError."""
        try:
            yield
        except h11.LocalProtocolError as error:
            raise UpstreamError(
                operation, "the request does not have the length it gave"
            ) from error
        except TimeoutError:
            raise  # the stall timer's
        except (h11.RemoteProtocolError, OSError) as error:
            if self._was_used and not self._answered and not self._h11.trailing_data[0]:
                raise Unanswered(operation, "the server closed without an answer") from error
            if isinstance(error, OSError):
                reason = "the server's connection broke off"
            else:
                reason = "the server does not speak valid HTTP/1.1"
            raise UpstreamError(operation, reason) from error
