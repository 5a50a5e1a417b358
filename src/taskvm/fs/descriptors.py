"""Open descriptors of the host, kept for reuse, and what all mounts of this process may have of them together.

A guest can name any number of files; a process has few descriptors, and the ones of sandboxes must starve neither the
host program nor each other. So there is one account for all: a set may hold as many as all sets leave free. One guest
that takes what it can gets half, two get a third each, and there is always some left for the next.

1. What can be opened again shares a quarter of the limit that is in force (the soft one). The one that was not used
   for longest goes first.
2. What cannot (a file without a name) is never closed to make room. It shares a quarter of what the limit can be
   raised to (the hard one), and the limit is raised as it grows (room.py). Beyond that there is an error, ENFILE.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from taskvm.fs.provider import Node, refuse
from taskvm.room import raise_limit

SHARE = 4
# What each set may hold, however many there are: a walk needs two.
LEAST = 4
SELDOM = 8
MOST_KEPT = 8192
MOST_PINNED = 1 << 16


def _limit(number: int) -> int:
    return 1 << 20 if number == resource.RLIM_INFINITY else number


def kept_limit() -> int:
    """Return how many descriptors of what can be opened again this process may keep."""
    return min(MOST_KEPT, _limit(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) // SHARE)


def pinned_limit() -> int:
    """Return how many descriptors of what has no name any more this process may have."""
    return min(MOST_PINNED, _limit(resource.getrlimit(resource.RLIMIT_NOFILE)[1]) // SHARE)


@dataclass(slots=True)
class Held:
    """One descriptor. By time.monotonic, its place is known `until` then, and it was last `written` to."""

    fd: int
    readable: bool = False
    writable: bool = False
    until: float = math.inf
    written: float = -math.inf


class Account:
    """How many descriptors several sets hold, which may belong to several threads."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._known = 0  # what it was when it was last asked, which costs as much as opening a file
        self._uses = 0  # until it is asked again
        self._lock = threading.Lock()
        self.total: int = 0

    def add(self, number: int) -> None:
        """Note that a set holds so many more."""
        with self._lock:
            self.total += number

    def room(self, held: int) -> int:
        """Return how many more a set that holds so many may have; negative when it has to close some."""
        self._uses -= 1
        if self._uses < 0:
            self._known, self._uses = self._limit(), SELDOM
        return max(LEAST, self._known - self.total) - held


KEPT = Account(kept_limit)
PINNED = Account(pinned_limit)


class DescriptorSet:
    """Descriptors by node, which can be opened again. Of one thread at a time."""

    def __init__(self, account: Account = KEPT) -> None:
        self._account = account
        self._held: OrderedDict[Node, Held] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, node: Node) -> Held | None:
        """Return the descriptor of `node`, if there is one. It stays open until the next `put` or `drop`."""
        held = self._held.get(node)
        if held is not None:
            self._held.move_to_end(node)
        return held

    def put(self, node: Node, held: Held) -> list[tuple[Node, Held]]:
        """Keep `held` for `node`; return what was closed for it: the one before, the eldest if they are too many."""
        before = self.drop(node)
        closed = [] if before is None else [(node, before)]
        self._held[node] = held
        self._account.add(1)
        while len(self._held) > 1 and self._account.room(len(self._held)) < 0:
            eldest = next(iter(self._held))
            closed.append((eldest, self._close(eldest)))
        return closed

    def drop(self, node: Node) -> Held | None:
        """Close the descriptor of `node`, and return what it was, if there is one."""
        return self._close(node) if node in self._held else None

    def items(self) -> list[tuple[Node, Held]]:
        """Return all, by node."""
        return list(self._held.items())

    def close(self) -> None:
        """Close all."""
        while self._held:
            self._close(next(iter(self._held)))

    def _close(self, node: Node) -> Held:
        held = self._held.pop(node)
        self._account.add(-1)
        # NFS and FUSE tell close(2) that what was written is lost (EIO, ENOSPC, EDQUOT). Whoever closes here has not
        # written it; the next fsync of the file tells it, for the kernel keeps the error until somebody has asked.
        with suppress(OSError):
            os.close(held.fd)
        return held


class Pins(DescriptorSet):
    """Descriptors by node, which cannot be opened again."""

    def __init__(self, account: Account = PINNED) -> None:
        super().__init__(account)

    def put(self, node: Node, held: Held) -> list[tuple[Node, Held]]:
        """Keep `held`, which is closed when there is no room (ENFILE)."""
        self.drop(node)
        if self._account.room(len(self._held)) < 1:
            os.close(held.fd)
            raise refuse(errno.ENFILE)
        self._held[node] = held
        self._account.add(1)
        if not len(self._held) % SELDOM:
            raise_limit(SHARE * (self._account.total + SELDOM))
        return []
