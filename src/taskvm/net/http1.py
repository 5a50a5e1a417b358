"""What both sides of HTTP/1.1 share: reading a message's body from a byte stream, by h11.

`net.http1guest` serves the guest's connection, `net.http1server` is a server's client.
"""

from __future__ import annotations

import h11

from taskvm.net.streams import ByteStream
from taskvm.wire.message import Header, HttpRefused, trailer_fields


class Http1Body:
    """Reads a message's body, or raw bytes once the protocol was switched."""

    def __init__(self, connection: h11.Connection, stream: ByteStream) -> None:
        self._h11 = connection
        self._stream = stream
        self._switched = False
        self._early = b""
        self._trailer: list[Header] = []

    @property
    def trailer(self) -> list[Header]:
        return self._trailer

    def switch(self) -> None:
        """From here on carry raw bytes; what came with the switch is read first."""
        self._switched = True
        self._early = bytes(self._h11.trailing_data[0])

    async def read_body(self) -> bytes:
        """Return a piece, or b"" at the end. Raises h11.RemoteProtocolError, OSError."""
        if self._early:
            data, self._early = self._early, b""
            return data
        if self._switched:
            return await self._stream.read()
        while True:
            event = await next_event(self._h11, self._stream)
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                try:
                    self._trailer = trailer_fields(event.headers.raw_items())
                except HttpRefused as refused:
                    raise ConnectionResetError("the trailer is too long") from refused
                return b""
            raise ConnectionResetError("the connection was closed within a message")


async def next_event(connection: h11.Connection, stream: ByteStream) -> object:
    """Return the next event that the peer's bytes make."""
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await stream.read())
    return event
