"""The last bytes of an endless stream, by their position in it. Pure: no clock, no input or output."""

from __future__ import annotations


class Ring:
    """Keeps the last `capacity` bytes that were appended. A position counts bytes from the stream's beginning."""

    def __init__(self, capacity: int) -> None:
        assert capacity > 0, "a ring that keeps nothing is none"
        self._capacity = capacity
        self._kept = bytearray()
        self.end: int = 0

    @property
    def capacity(self) -> int:
        """How many bytes are kept at most."""
        return self._capacity

    @property
    def start(self) -> int:
        """The position of the oldest byte that is kept."""
        return self.end - len(self._kept)

    def append(self, data: bytes) -> None:
        """Add `data` at the end; what no longer fits is dropped at the start."""
        self.end += len(data)
        self._kept += data[-self._capacity :]
        # CPython moves the buffer's beginning: no byte is copied.
        del self._kept[: max(0, len(self._kept) - self._capacity)]

    def read(self, position: int, max_bytes: int) -> tuple[int, bytes]:
        """Return how many bytes from `position` on are lost, and at most `max_bytes` of those after them."""
        assert position <= self.end, "nobody has read what was not written"
        skipped = max(0, self.start - position)
        offset = position + skipped - self.start
        return skipped, bytes(self._kept[offset : offset + max_bytes])
