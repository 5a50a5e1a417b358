"""What one sandbox has in flight at once: its requests, and the memory that their heads and bodies take.

The limits of a connection and of its streams multiply: this is the bound of their product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from taskvm.wire.message import Asked, RequestHead

# A busy build has some dozens. Each costs a few KiB for its tasks, its streams and its head.
MAX_REQUESTS = 1024
# Bytes of all heads: each is held as it was asked, and as it is sent.
MAX_HEADS_BYTES = 16 * 1024 * 1024
# Bytes unread that all connections of HTTP/2 may hold; past it a connection gets no more than the least.
WINDOWS_BYTES = 64 * 1024 * 1024
LEAST_WINDOW = 65_535  # what HTTP/2 begins with (RFC 9113 section 6.9.2)
FIELD_COST = 128  # bytes that a field takes besides its text: two objects and a tuple of them


class InFlight:
    """Counts the requests of one sandbox from their heads to the ends of their answers."""

    def __init__(self) -> None:
        self._requests = 0
        self._bytes = 0
        self._windows = 0

    def take(self, asked: Asked) -> bool:
        """Count a request; False: there is no room for it, and it must be forgotten."""
        size = _size(asked)
        if self._requests >= MAX_REQUESTS or self._bytes + size > MAX_HEADS_BYTES:
            return False
        self._requests += 1
        self._bytes += size
        return True

    def give_back(self, asked: Asked) -> None:
        """Count it no more."""
        self._requests -= 1
        self._bytes -= _size(asked)

    @contextmanager
    def window(self, wanted: int) -> Iterator[int]:
        """Give a connection of HTTP/2 its window, for as long as it lasts: `wanted`, or the least."""
        given = wanted if self._windows + wanted <= WINDOWS_BYTES else LEAST_WINDOW
        self._windows += given
        try:
            yield given
        finally:
            self._windows -= given


def _size(asked: Asked) -> int:
    headers = asked.head.headers if isinstance(asked.head, RequestHead) else ()
    fields = sum(len(name) + len(value) + FIELD_COST for name, value in headers)
    return len(asked.method) + len(asked.target) + fields
