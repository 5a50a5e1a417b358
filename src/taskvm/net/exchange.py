"""One request and its answer, as the relay sees them: a guest's side and a server's side.

Each HTTP version implements both. A body is read in pieces, each at most what flow control lets the
peer send; a write returns when the bytes were taken, so back-pressure passes through. After a
WebSocket's 101 the same calls carry raw bytes.
"""

from __future__ import annotations

from typing import Protocol

from taskvm.errors import UpstreamError
from taskvm.wire.message import Asked, Header, RequestHead, ResponseHead


class StreamEnded(UpstreamError):  # noqa: N818 - what a server may do
    """Raised when a server resets a stream of HTTP/2; the guest gets the same code."""

    def __init__(self, operation: str, code: int) -> None:
        super().__init__(operation, f"the server reset the stream (HTTP/2 error {code})")
        self.code = code


class Unanswered(UpstreamError):  # noqa: N818 - what a server may do
    """Raised when a connection that was used before ends without a byte of an answer.

    Servers close one that was idle for too long, and a request may cross that: it was not read.
    """


class Incoming(Protocol):
    """The body of a message, and its trailer."""

    async def read(self) -> bytes:
        """Return at least one byte, or b"" at the end. Raises OSError where it broke off."""

    @property
    def trailer(self) -> list[Header]:
        """The fields after the body, once its end was read."""


class GuestExchange(Incoming, Protocol):
    """What the guest asks, and where its answer goes. Writes raise OSError when it is gone."""

    @property
    def asked(self) -> Asked:
        """The request."""

    async def send_head(self, head: ResponseHead) -> None:
        """Send an informational or the final head."""

    async def send(self, data: bytes) -> None:
        """Send a piece of the body."""

    async def end(self, trailer: list[Header]) -> None:
        """Send the end."""

    def close_after(self) -> None:
        """Let no request follow on this connection, where requests follow each other."""

    def break_off(self, code: int | None = None) -> None:
        """End the answer so that it does not look complete; `code` is HTTP/2's, if known."""


class ServerExchange(Incoming, Protocol):
    """A request on its way to a server. All calls but `release` raise UpstreamError."""

    async def send_head(self, head: RequestHead) -> None:
        """Send the request; without a body, all of it. Raises HttpRefused."""

    async def send(self, data: bytes) -> None:
        """Send a piece of the body."""

    async def end(self, trailer: list[Header]) -> None:
        """Send the end of the body."""

    async def read_head(self) -> ResponseHead:
        """Return the next head: informational ones come before the final one."""

    def release(self, *, complete: bool) -> None:
        """Give the connection back, or drop what is left of an incomplete exchange. Idempotent."""
