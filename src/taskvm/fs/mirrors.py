"""The tree of what is private in a mount (fs/privatelayer.py), by the paths that the guest knows.

A directory here whose path is hidden is a private one. Any other is a mirror: it stands for a directory of the mount,
holds what is private in that, and is never shown itself. It stays when the host removes that directory.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from taskvm.fs.memory import Memory
from taskvm.fs.patterns import Path, Patterns
from taskvm.fs.provider import ROOT, DirEntry, Entry, Node, refuse
from taskvm.fs.walk import DT_DIR, walk

_MODE = 0o755


class Mirrors:
    """Finds what is private in `private`, by what `patterns` hide."""

    def __init__(self, private: Memory, patterns: Patterns) -> None:
        self._private = private
        self._patterns = patterns

    @contextmanager
    def at(self, path: Path, *, make: bool = False) -> Iterator[Node | None]:
        """Yield what mirrors the directory at `path`, None when nothing does."""
        held: list[Node] = [ROOT]
        try:
            for name in path:
                found = self._step(held[-1], name, make=make)
                if found is None:
                    yield None
                    return
                held.append(found)
            yield held[-1]
        finally:
            for node in held[1:]:
                self._private.forget(node, 1)

    def _step(self, node: Node, name: bytes, *, make: bool) -> Node | None:
        try:
            entry = self._private.lookup(node, name)
        except FileNotFoundError:
            return self._private.mkdir(node, name, _MODE).node if make else None
        if stat.S_ISDIR(entry.attr.st_mode):
            return entry.node
        self._private.forget(entry.node, 1)
        if make:
            raise refuse(errno.ENOTDIR)  # a private file, and by now the host has a directory there
        return None

    def find(self, mirror: Node | None, path: Path) -> Entry | None:
        """Return what is private at `path`, which is in what `mirror` stands for, with a reference."""
        if mirror is None:
            return None
        try:
            entry = self._private.lookup(mirror, path[-1])
        except FileNotFoundError:
            return None
        if self._patterns.hides(path, directory=stat.S_ISDIR(entry.attr.st_mode)):
            return entry
        self._private.forget(entry.node, 1)
        return None

    def kind_of(self, mirror: Node | None, path: Path) -> bool | None:
        """Say whether what is private at `path` is a directory; None when nothing is."""
        entry = self.find(mirror, path)
        if entry is None:
            return None
        self._private.forget(entry.node, 1)
        return stat.S_ISDIR(entry.attr.st_mode)

    def covers(self, mirror: Node | None, path: Path, name: bytes) -> bool:
        """Say whether something private has the place of `name` in the directory at `path`."""
        if mirror is None or name in (b".", b".."):
            return False
        return self.kind_of(mirror, (*path, name)) is not None

    def list(self, mirror: Node | None, path: Path, cookie: int, size: int) -> list[DirEntry]:
        """Return about `size` bytes of what is private in the directory at `path`; empty at the end."""
        while mirror is not None:
            entries = self._private.readdir(mirror, cookie, size)
            shown = [
                entry
                for entry in entries
                if entry.name not in (b".", b"..")
                and self._patterns.hides((*path, entry.name), directory=entry.kind == DT_DIR)
            ]
            if shown or not entries:
                return shown
            cookie = entries[-1].offset
        return []

    def refuse_exposure(self, mirror: Node, old: Path, new: Path) -> None:
        """Refuse a move by which something would no longer be private, or a mirror become so."""
        if self._patterns.by_name:
            return
        for found in walk(self._private, mirror):
            before, after = (
                self._patterns.hides(top + found.path, directory=found.directory)
                for top in (old, new)
            )
            if before != after:
                raise refuse(errno.EACCES)

    def move(self, old: Path, new: Path) -> None:
        """Move a mirror, over an empty one if there is one."""
        with self.at(old[:-1]) as source, self.at(new[:-1], make=True) as target:
            assert source is not None
            assert target is not None
            self._private.rename(source, old[-1], target, new[-1], 0)

    def remove_empty(self, path: Path) -> None:
        """Remove a mirror, unless that of a directory which the host removed is in it."""
        with self.at(path[:-1]) as parent:
            if parent is None:
                return
            try:
                self._private.rmdir(parent, path[-1])
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY):
                    raise
