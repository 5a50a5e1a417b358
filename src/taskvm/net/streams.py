"""The two plain byte streams of the gateway: the guest's connection and a socket to a server.

Neither buffers: a write returns when the bytes have been taken (by the guest's credit, by the
kernel), so back-pressure passes through, and what one side sends the other must be ready to take.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Protocol

from taskvm.port import Inlet, Outlet

READ_SIZE = 64 * 1024


class ByteStream(Protocol):
    """A duplex stream of bytes.

    Errors are OSError (connection lost) and ssl.SSLError (not trusted).
    """

    async def read(self, max_bytes: int = READ_SIZE) -> bytes:
        """Return at least one byte, or b"" at the end."""

    async def write(self, data: bytes) -> None:
        """Send all of `data`."""

    async def end(self) -> None:
        """Say that no more bytes come; the other direction stays open."""

    def abort(self) -> None:
        """Drop the connection so that the peer sees a failure, not an end. Idempotent."""


class GuestStream:
    """One connection of the guest. `unread` gives bytes back that were only looked at."""

    def __init__(self, inlet: Inlet, outlet: Outlet) -> None:
        self._inlet = inlet
        self._outlet = outlet
        self._unread = b""
        self._ended = False

    async def read(self, max_bytes: int = READ_SIZE) -> bytes:
        if self._unread:
            data, self._unread = self._unread[:max_bytes], self._unread[max_bytes:]
            return data
        return await self._inlet.read(max_bytes)

    def unread(self, data: bytes) -> None:
        """Put `data` in front of what is read next."""
        self._unread = data + self._unread

    async def write(self, data: bytes) -> None:
        await self._outlet.write(data)

    async def end(self) -> None:
        self._ended = True
        self._outlet.end()

    def abort(self, reason: int = errno.ECONNRESET) -> None:
        # After an END from both sides the stream's number is free: a RESET could hit its successor.
        if not (self._ended and self._inlet.ended):
            self._ended = True
            self._outlet.reset(reason)


class SocketStream:
    """A connected TCP socket of the host."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._loop = asyncio.get_running_loop()

    async def read(self, max_bytes: int = READ_SIZE) -> bytes:
        return await self._loop.sock_recv(self._socket, max_bytes)

    async def write(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._socket, data)

    async def end(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def is_quiet(self) -> bool:
        """Say whether an idle connection is still good: nothing has come, not even the end."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def abort(self) -> None:
        self._socket.close()
