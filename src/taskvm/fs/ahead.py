"""Which small files to push into a guest's page cache before it asks: the next ones of a directory it reads through.

Only for mounts that nobody in the guest can write to: a pushed page takes the place of one that a program has changed.
A directory counts as read through from the second file of it on, so that `find` and `ls` cost nothing. No I/O.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from dataclasses import dataclass, field

from taskvm.fs.provider import Node
from taskvm.wire.fuse_replies import Attr

# Larger ones come in few requests anyway; the kernel reads those ahead by itself.
MAX_SIZE = 64 * 1024
# What is pushed at once: twice as much each time, up to what the guest's agent keeps waiting.
FIRST_FILES, MOST_FILES = 16, 256
MOST_BYTES = 1024 * 1024
# Directories that are read at the same time, as by `rg` with its threads; a guest makes the host remember no more.
MAX_DIRECTORIES = 64
MAX_FILES = 4096


@dataclass(slots=True)
class _Listing:
    """The small files of one directory, in the order of its listing. Those before `next` were read or pushed."""

    files: list[tuple[Node, int]] = field(default_factory=list)
    next: int = 0
    reads: int = 0
    at_once: int = FIRST_FILES


class Ahead:
    """What was listed last, and how far it has been read."""

    def __init__(self) -> None:
        self._listings: OrderedDict[Node, _Listing] = OrderedDict()
        self._where: dict[Node, tuple[Node, int]] = {}

    def listing(self, directory: Node) -> None:
        """Note that a listing of `directory` begins."""
        self._drop(directory)
        self._listings[directory] = _Listing()
        if len(self._listings) > MAX_DIRECTORIES:
            self._drop(next(iter(self._listings)))

    def listed(self, directory: Node, node: Node, attr: Attr) -> None:
        """Note that the guest was told of a file."""
        listing = self._listings.get(directory)
        small = stat.S_ISREG(attr.st_mode) and 0 < attr.st_size <= MAX_SIZE
        if listing is not None and small and len(listing.files) < MAX_FILES:
            self._where[node] = directory, len(listing.files)
            listing.files.append((node, attr.st_size))

    def read(self, node: Node) -> list[tuple[Node, int]]:
        """Note that the guest reads a file from its beginning; return (node, size) of what to push."""
        directory, position = self._where.pop(node, (0, 0))
        listing = self._listings.get(directory)
        if listing is None:
            return []
        listing.reads += 1
        if listing.reads < 2:
            return []
        listing.next = max(listing.next, position + 1)
        return self._take(listing)

    def _take(self, listing: _Listing) -> list[tuple[Node, int]]:
        taken: list[tuple[Node, int]] = []
        room = MOST_BYTES
        for node, size in listing.files[listing.next : listing.next + listing.at_once]:
            room -= size
            if room < 0:
                break
            taken.append((node, size))
            self._where.pop(node, None)
        listing.next += len(taken)
        listing.at_once = min(2 * listing.at_once, MOST_FILES)
        return taken

    def _drop(self, directory: Node) -> None:
        listing = self._listings.pop(directory, None)
        for node, _size in listing.files if listing is not None else ():
            if self._where.get(node, (0, 0))[0] == directory:
                del self._where[node]
