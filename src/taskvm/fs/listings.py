"""Listings of directories that are read in parts: each goes on where it stopped, whatever is removed meanwhile.

The next part is asked for by the offset of the last entry that was taken. Most file systems find the place by it at any
time. Others count entries (tmpfs before Linux 6.6), and after it leave out as many as were removed before it: `rm -r`
would find a directory that is not empty. So the descriptor that was read from is kept, and what was last read from it,
of which a part may not have had room in the answer. When there are too many, the file system finds the place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from taskvm.fs import syscalls
from taskvm.fs.descriptors import DescriptorSet, Held
from taskvm.fs.provider import Node

MOST = 16
# What is read at once, and so kept of each.
MOST_BYTES = 64 * 1024
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

Raw = tuple[bytes, int, int, int]


@dataclass(slots=True)
class _Listing:
    """`entries` are what was read last, from the offset `start` on; the next are those after the last one."""

    node: Node
    start: int
    entries: list[Raw] = field(default_factory=list)

    def after(self, offset: int) -> list[Raw] | None:
        """Return what is left after `offset`, or None when that is somewhere else."""
        if self.entries and offset == self.entries[-1][3]:
            return []
        if offset == self.start:
            return self.entries
        for index, entry in enumerate(self.entries):
            if offset == entry[3]:
                return self.entries[index + 1 :]
        return None


class Listings:
    """Those of one mount that were begun last."""

    def __init__(self) -> None:
        self._fds = DescriptorSet()
        self._listings: dict[int, _Listing] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._listings)

    def read(self, node: Node, at: int, offset: int, size: int) -> list[Raw]:
        """Return entries of the directory `node`, which `at` refers to, after `offset`; none at the end."""
        for number, listing in list(self._listings.items()) if offset else ():
            left = listing.after(offset) if listing.node == node else None
            if left:
                return left
            if left is not None:
                return self._go_on(number, offset, size)
        return self._go_on(self._begin(node, at, offset), offset, size)

    def forget(self, node: Node) -> None:
        """Let go of those of a directory."""
        for number, listing in list(self._listings.items()):
            if listing.node == node:
                self._end(number)

    def close(self) -> None:
        """Let go of all."""
        self._listings.clear()
        self._fds.close()

    def _begin(self, node: Node, at: int, offset: int) -> int:
        fd = os.open(b".", _FLAGS, dir_fd=at)
        try:
            if offset:
                os.lseek(fd, offset if offset < 1 << 63 else offset - (1 << 64), os.SEEK_SET)
        except OSError:  # a guest may ask for any offset
            os.close(fd)
            raise
        self._next += 1
        self._listings[self._next] = _Listing(node, offset)
        for number, _held in self._fds.put(self._next, Held(fd)):
            del self._listings[number]
        if len(self._listings) > MOST:
            self._end(next(iter(self._listings)))
        return self._next

    def _go_on(self, number: int, offset: int, size: int) -> list[Raw]:
        held, listing = self._fds.get(number), self._listings.pop(number)
        self._listings[number] = listing  # the last one that was used
        entries: list[Raw] = []
        try:
            if held is not None:
                entries = syscalls.read_directory(held.fd, min(size, MOST_BYTES))
        finally:
            listing.start, listing.entries = offset, entries
            if not entries:
                self._end(number)
        return entries

    def _end(self, number: int) -> None:
        self._fds.drop(number)
        del self._listings[number]
