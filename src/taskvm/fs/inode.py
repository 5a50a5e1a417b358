"""What a file system in memory (fs/memory.py) is made of, and the form in which it is saved with its guest."""

from __future__ import annotations

import stat
import time
from collections.abc import Mapping

import msgspec

from taskvm.fs.provider import ROOT, Node


class Inode:
    """One file, directory, link, FIFO or socket."""

    def __init__(self, node: Node, mode: int, parent: Inode | None = None) -> None:
        self.node = node
        self.mode = mode
        self.links = 0
        self.references = 0
        self.parent = parent or self
        self.data = bytearray()
        # name -> (cookie, inode). Cookies only grow, so an offset stays right while entries come and go.
        self.entries: dict[bytes, tuple[int, Inode]] = {}
        self.next_cookie = 3  # 1 and 2 are `.` and `..`
        self.xattrs: dict[bytes, bytes] = {}
        self.atime_ns = self.mtime_ns = self.ctime_ns = time.time_ns()

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)

    def touched(self) -> None:
        self.mtime_ns = self.ctime_ns = time.time_ns()


class InodeState(msgspec.Struct, frozen=True, array_like=True):
    """An inode as it is saved; other inodes are named by their numbers."""

    node: Node
    mode: int
    links: int
    references: int
    parent: Node
    data: bytes
    entries: list[tuple[bytes, int, Node]]
    next_cookie: int
    xattrs: dict[bytes, bytes]
    times_ns: tuple[int, int, int]


def export_inodes(inodes: Mapping[Node, Inode]) -> list[InodeState]:
    """Return all of `inodes` in the form that is saved."""
    return [
        InodeState(
            node=inode.node,
            mode=inode.mode,
            links=inode.links,
            references=inode.references,
            parent=inode.parent.node,
            data=bytes(inode.data),
            entries=[(name, cookie, to.node) for name, (cookie, to) in inode.entries.items()],
            next_cookie=inode.next_cookie,
            xattrs=inode.xattrs,
            times_ns=(inode.atime_ns, inode.mtime_ns, inode.ctime_ns),
        )
        for inode in inodes.values()
    ]


def restore_inodes(states: list[InodeState]) -> dict[Node, Inode]:
    """Return the inodes that were saved. Raises ValueError when they are not a tree's."""
    inodes = {state.node: Inode(state.node, state.mode) for state in states}
    if ROOT not in inodes:
        raise ValueError("the saved tree has no root")
    try:
        for state in states:
            inode = inodes[state.node]
            inode.links, inode.references = state.links, state.references
            # That of a removed directory, which somebody is still in, may be gone.
            inode.parent = inodes.get(state.parent, inodes[ROOT])
            inode.data += state.data
            inode.entries = {name: (cookie, inodes[to]) for name, cookie, to in state.entries}
            inode.next_cookie = state.next_cookie
            inode.xattrs = dict(state.xattrs)
            inode.atime_ns, inode.mtime_ns, inode.ctime_ns = state.times_ns
    except KeyError as error:
        raise ValueError(f"the saved inode {error} is not there") from None
    return inodes
