"""Open descriptors of the host, kept for reuse and never more than a fixed number.

A guest can name any number of files; a process has few descriptors, and the ones of a sandbox must not starve the
host program. So each use keeps its own bounded set, least recently used first out.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, replace

from taskvm.fs.provider import Node


def descriptor_budget() -> int:
    """Return how many descriptors one set of a mount may keep: a sixteenth of what the process may have."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = 1 << 20
    return max(32, min(2048, soft // 16))


@dataclass(frozen=True, slots=True)
class Held:
    """One descriptor. `until` (of time.monotonic) is when its place has to be looked at again."""

    fd: int
    readable: bool = False
    writable: bool = False
    until: float = float("inf")


class DescriptorSet:
    """At most `limit` descriptors, by node."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[Node, Held] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, node: Node) -> Held | None:
        """Return the descriptor of `node`, if there is one. It stays open until the next `put` or `drop`."""
        held = self._held.get(node)
        if held is not None:
            self._held.move_to_end(node)
        return held

    def put(self, node: Node, held: Held) -> None:
        """Keep `held` for `node`, in the place of the one before, and close the eldest above the limit."""
        self.drop(node)
        self._held[node] = held
        if len(self._held) > self._limit:
            _node, eldest = self._held.popitem(last=False)
            _close(eldest)

    def renew(self, node: Node, until: float) -> None:
        """Note that the descriptor of `node` was looked at."""
        self._held[node] = replace(self._held[node], until=until)

    def drop(self, node: Node) -> None:
        """Close the descriptor of `node`, if there is one."""
        held = self._held.pop(node, None)
        if held is not None:
            _close(held)

    def items(self) -> list[tuple[Node, Held]]:
        """Return all, by node."""
        return list(self._held.items())

    def close(self) -> None:
        """Close all."""
        while self._held:
            _node, held = self._held.popitem()
            _close(held)


def _close(held: Held) -> None:
    # NFS and FUSE tell close(2) that what was written is lost (EIO, ENOSPC, EDQUOT). Whoever closes here has not
    # written it; the next fsync of the file tells it, for the kernel keeps the error until somebody has asked.
    with suppress(OSError):
        os.close(held.fd)
