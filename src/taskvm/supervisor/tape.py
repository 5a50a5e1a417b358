"""One output stream of a command in the supervisor: a bounded past, and any number of readers of what comes.

Rule 1: memory is bounded by TAPE_BYTES, whatever its readers do.
Rule 2: a reader that is late is told how much it has missed. One that insists (`lossless`) misses nothing: it holds
        the writer, and with it the command, as the reader of a pipe does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from taskvm.ring import Ring

# About 2,500 lines of a terminal: what a person scrolls back to, and little for each of many commands.
TAPE_BYTES = 256 * 1024
_READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a tape, and how many before them this reader has missed. No bytes: the end."""

    data: bytes
    skipped: int = 0


class Tape:
    """What one stream has said. One task writes; `reader` gives each client its own place in it."""

    def __init__(self, capacity: int = TAPE_BYTES) -> None:
        self._ring = Ring(capacity)
        self._ended = False
        self._changed = asyncio.Event()
        self._lossless: set[Reader] = set()

    @property
    def moved(self) -> int:
        """How many bytes have been written so far."""
        return self._ring.end

    async def write(self, data: bytes) -> None:
        """Add `data`, in parts where lossless readers have no room for all of it yet."""
        view = memoryview(data)
        while view:
            room = await self._wait_room()
            self._ring.append(bytes(view[:room]))
            view = view[room:]
            self._wake()

    def end(self) -> None:
        """Say that no more comes. Idempotent."""
        self._ended = True
        self._wake()

    @contextmanager
    def reader(self, *, lossless: bool = False) -> Iterator[Reader]:
        """Read from the oldest byte that is kept."""
        reader = Reader(self, self._ring.start)
        if lossless:
            self._lossless.add(reader)
        try:
            yield reader
        finally:
            self._lossless.discard(reader)
            self._wake()

    async def read(self, position: int, *, follow: bool) -> Piece:
        """Return what is there from `position` on; with `follow` wait for it, and return no bytes at the end only."""
        while position == self._ring.end and follow and not self._ended:
            await self._changed.wait()
        skipped, data = self._ring.read(position, _READ_BYTES)
        return Piece(data, skipped)

    async def _wait_room(self) -> int:
        while True:
            slowest = min((each.position for each in self._lossless), default=self._ring.end)
            room = self._ring.capacity - (self._ring.end - slowest)
            if room > 0:
                return room
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()  # whoever waits now goes on; the next one waits for the next change
        self._changed = asyncio.Event()

    def advanced(self) -> None:
        """Take note that a reader has moved."""
        if self._lossless:
            self._wake()


class Reader:
    """One client's place in a tape."""

    def __init__(self, tape: Tape, position: int) -> None:
        self._tape = tape
        self.position: int = position

    async def read(self, *, follow: bool = True) -> Piece:
        """Return the next piece; no bytes at the end."""
        piece = await self._tape.read(self.position, follow=follow)
        self.position += piece.skipped + len(piece.data)
        self._tape.advanced()
        return piece
