"""TLS over a byte stream, by MemoryBIO: for the guest's side, as its server, and for the servers'.

Not asyncio's start_tls: it loses bytes that were read before it (cpython#142352), and we always
read before. Rule: one reader and one writer at a time. OpenSSL's output is sent under a lock, in
order; a reader may send too (a key update is answered while reading).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import TypeVar

from taskvm.net.streams import READ_SIZE, ByteStream

_T = TypeVar("_T")


class TlsStream:
    """A ByteStream inside TLS. Call `handshake` first."""

    def __init__(
        self,
        raw: ByteStream,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
    ) -> None:
        self._raw = raw
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        self._sending = asyncio.Lock()

    async def handshake(self) -> None:
        """Agree on keys. Raises ssl.SSLError; the alert that says why has then been sent."""
        try:
            await self._drive(self._tls.do_handshake)
        except ssl.SSLError:
            await self._flush()
            raise

    @property
    def version(self) -> str:
        """The protocol that was agreed on, such as TLSv1.3."""
        return self._tls.version() or ""

    @property
    def protocol(self) -> str:
        """What ALPN agreed on, such as h2; empty when nothing was."""
        return self._tls.selected_alpn_protocol() or ""

    async def read(self, max_bytes: int = READ_SIZE) -> bytes:
        try:
            data = await self._drive(lambda: self._tls.read(max_bytes))
        except ssl.SSLZeroReturnError:
            return b""
        # OpenSSL gives a record at a time, 16 KiB: what is here already goes along.
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while (
                data and len(data) < max_bytes and (more := self._tls.read(max_bytes - len(data)))
            ):
                data += more
        return data

    async def write(self, data: bytes) -> None:
        # A MemoryBIO takes everything: cut, so that memory holds one piece, not all of it.
        view = memoryview(data)
        for start in range(0, len(view), READ_SIZE):
            self._tls.write(view[start : start + READ_SIZE])
            await self._flush()

    async def end(self) -> None:
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()  # writes our close_notify; the peer's is not waited for
        await self._flush()
        await self._raw.end()

    def abort(self) -> None:
        self._raw.abort()

    async def _drive(self, operation: Callable[[], _T]) -> _T:
        """Run an operation of OpenSSL, feeding it until it can finish."""
        while True:
            try:
                result = operation()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self._raw.read()
                # An end without close_notify reads as an end: many servers send none, and HTTP's
                # own framing tells whether the message was whole.
                self._incoming.write(data) if data else self._incoming.write_eof()
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        if not self._outgoing.pending:
            return
        async with self._sending:
            if data := self._outgoing.read():
                await self._raw.write(data)
