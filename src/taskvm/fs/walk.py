"""Everything below a directory of a provider, as a guest would find it: for wrappers that must have looked."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

from taskvm.fs.provider import DirEntry, Entry, Node, Provider

Path = tuple[bytes, ...]
Lookup = Callable[[Node, bytes], Entry]
DT_UNKNOWN = 0
DT_DIR = stat.S_IFDIR >> 12
_SIZE = 64 * 1024
_CLOSED = (errno.EACCES, errno.EPERM, errno.EXDEV)
T = TypeVar("T")
U = TypeVar("U")


class Found(NamedTuple):
    """`name` in the directory `parent`; `path` leads there from where the walk began."""

    path: Path
    parent: Node
    name: bytes
    directory: bool


def walk(
    provider: Provider, top: Node, lookup: Lookup | None = None, *, skip_closed: bool = False
) -> Iterator[Found]:
    """Yield what is below `top`, a directory before what is in it. Every reference is given back.

    `lookup` is called in the place of the provider's own. `skip_closed` leaves out what is in directories that are no
    way to anything: those that this process may not look into, and what is mounted inside.

    A directory is held as long as anything in it is looked at, as a guest's kernel does. What is removed meanwhile is
    left out; any other error of the provider is raised.
    """
    frames: list[tuple[Node, Path, Iterator[DirEntry]]] = [(top, (), listing(provider, top))]
    try:
        while frames:
            node, path, entries = frames[-1]
            entry = _tried(skip_closed, lambda listed: next(listed, None), entries)
            if entry is None:
                frames.pop()
                if frames:
                    provider.forget(node, 1)
                continue
            find = partial(_directory, provider, lookup or provider.lookup, node)
            child = _tried(skip_closed, find, entry)
            below = (*path, entry.name)
            if child is not None:
                frames.append((child, below, listing(provider, child)))
            yield Found(below, node, entry.name, child is not None)
    finally:
        for node, _path, _entries in frames[1:]:
            provider.forget(node, 1)


def _tried(skip_closed: bool, do: Callable[[T], U | None], what: T) -> U | None:
    try:
        return do(what)
    except OSError as error:
        if skip_closed and error.errno in _CLOSED:
            return None
        raise


def listing(provider: Provider, node: Node) -> Iterator[DirEntry]:
    """Yield the entries of a directory, without `.` and `..`."""
    offset = 0
    while entries := provider.readdir(node, offset, _SIZE):
        yield from (entry for entry in entries if entry.name not in (b".", b".."))
        offset = entries[-1].offset


def _directory(provider: Provider, lookup: Lookup, node: Node, entry: DirEntry) -> Node | None:
    """Return the node of a directory, with a reference; None for anything else."""
    if entry.kind not in (DT_DIR, DT_UNKNOWN):
        return None
    try:
        child = lookup(node, entry.name)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(child.attr.st_mode):
        return child.node
    provider.forget(child.node, 1)
    return None
