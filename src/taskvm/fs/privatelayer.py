"""A Shadow under whose hidden names the guest may put things of its own, which are kept in a Memory.

Rule 1: a thing goes where its own name says: hidden as what it is (a file, a directory), it is private, and so is all
    that is in it; else it is the shadow's, which refuses what would be hidden as the other kind.
Rule 2: nothing moves or is linked from one to the other (EXDEV: `mv` copies). What is private moves with the directory
    that it is in.
Rule 3: a node of the guest's is odd in the shadow and even in the private tree; a private one that was not given to
    the guest is ESTALE. Inode numbers of the shadow pass through, for git's index is made of them.
"""

from __future__ import annotations

import errno
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from taskvm.fs.attributes import Attributes
from taskvm.fs.divided import Divided, Target, refuse_crossing
from taskvm.fs.memory import Memory
from taskvm.fs.mirrors import Mirrors
from taskvm.fs.places import Path
from taskvm.fs.provider import Change, DirEntry, Entry, Node, Source, refuse
from taskvm.fs.syscalls import RENAME_EXCHANGE
from taskvm.wire.fuse import SetAttr
from taskvm.wire.fuse_replies import Attr, Lifetime

if TYPE_CHECKING:
    from taskvm.fs.shadow import Shadow

# Offsets of private entries in the listing of a directory of the shadow: behind those of fs/specials.py, before those
# of fs/router.py, so that each can be in the other.
_FIRST_OFFSET = 0x7FFF_FFFF_4000_0000
_END_OFFSET = 0x7FFF_FFFF_8000_0000
# Inode numbers of private files; below those of fs/specials.py, and beyond any file system of the host.
_FIRST_INO = 1 << 61
# Of the two providers.
_SHADOW, _PRIVATE = 0, 1


class PrivateLayerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a mount is saved with its guest."""

    shadow: bytes
    private: bytes
    given: dict[Node, int]


class PrivateLayer(Divided):
    """Serves `shadow` and, where that hides, `private`; both are opened, and closed by this."""

    def __init__(self, shadow: Shadow, private: Memory) -> None:
        self._shadow = shadow
        self._private = private
        self._mirrors = Mirrors(private, shadow.patterns)
        self._given: Counter[Node] = (
            Counter()
        )  # private nodes, and how often the guest was told each
        self.lasting = shadow.lasting
        self.prompt = shadow.prompt
        self.request_deadline_s = shadow.request_deadline_s
        self.xattrs = shadow.xattrs or private.xattrs

    def close(self) -> None:
        self._shadow.close()
        self._private.close()

    def sources(self) -> Sequence[Source]:
        return self._shadow.sources()

    def rest(self) -> None:
        self._shadow.rest()

    def export_state(self) -> bytes:
        state = PrivateLayerState(
            shadow=self._shadow.export_state(),
            private=self._private.export_state(),
            given=dict(self._given),
        )
        return msgspec.msgpack.encode(state)

    def import_state(self, state: bytes) -> None:
        saved = msgspec.msgpack.decode(state, type=PrivateLayerState)
        self._given = Counter(saved.given)
        self._private.import_state(saved.private)
        self._shadow.import_state(saved.shadow)

    @property
    def changes(self) -> Callable[[Change], None]:
        return self._shadow.changes

    @changes.setter
    def changes(self, listener: Callable[[Change], None]) -> None:
        # Nobody but the guest changes what is private.
        self._shadow.changes = lambda change: listener(Change(_odd(change.node), change.name))

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        directory = self._target(parent)
        if directory.number == _SHADOW:
            path = self._path(directory, name)
            if self._shadow.patterns.may_hide(path):
                with self._mirrors.at(path[:-1]) as mirror:
                    found = self._mirrors.find(mirror, path)
                    if found is not None:
                        return self._told(found, _PRIVATE)
        return self._told(directory.provider.lookup(directory.node, name), directory.number)

    def forget(self, node: Node, count: int) -> None:
        if node % 2:
            self._shadow.forget((node + 1) // 2, count)
            return
        dropped = min(count, self._given[node // 2])
        self._given[node // 2] -= dropped
        if not self._given[node // 2]:
            del self._given[node // 2]
        if dropped:
            self._private.forget(node // 2, dropped)

    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        directory = self._target(node)
        if directory.number == _PRIVATE:
            return [_listed(entry) for entry in self._private.readdir(directory.node, offset, size)]
        try:
            path = self._path(directory, b".")[:-1]
        except OSError:  # removed, and still somebody's working directory
            return self._shadow.readdir(directory.node, offset, size)
        with self._mirrors.at(path) as mirror:
            while not _FIRST_OFFSET <= offset < _END_OFFSET:
                entries = self._shadow.readdir(directory.node, offset, size)
                if not entries:
                    offset = _FIRST_OFFSET
                    break
                shown = [
                    each for each in entries if not self._mirrors.covers(mirror, path, each.name)
                ]
                if shown:
                    return shown
                offset = entries[-1].offset
            return self._listed_behind(mirror, path, offset, size)

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        with self._place_for(parent, name, directory=False) as (number, provider, node):
            return self._told(provider.create(node, name, mode, flags), number)

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        with self._place_for(parent, name, directory=False) as (number, provider, node):
            return self._told(provider.mknod(node, name, mode), number)

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        with self._place_for(parent, name, directory=True) as (number, provider, node):
            return self._told(provider.mkdir(node, name, mode), number)

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        with self._place_for(parent, name, directory=False) as (number, provider, node):
            return self._told(provider.symlink(node, name, target), number)

    def link(self, node: Node, parent: Node, name: bytes) -> Entry:
        source = self._target(node)
        with self._place_for(parent, name, directory=False) as target:
            refuse_crossing(source, target)
            return self._told(target.provider.link(source.node, target.node, name), target.number)

    def unlink(self, parent: Node, name: bytes) -> None:
        with self._place_of(parent, name) as (target, _directory):
            target.provider.unlink(target.node, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        with self._place_of(parent, name) as (target, _directory):
            if target.number == _PRIVATE:
                target.provider.rmdir(target.node, name)
                return
        path = self._path(target, name)
        self._refuse_contents(path)
        target.provider.rmdir(target.node, name)
        self._mirrors.remove_empty(path)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        with self._place_of(parent, name) as (source, directory):
            with self._place_for(new_parent, new_name, directory=directory) as target:
                refuse_crossing(source, target)
                if source.number == _PRIVATE:
                    self._rename_private(
                        (parent, source, name), (new_parent, target, new_name), flags
                    )
                    return
            moved = self._move_mirror(source, name, target, new_name, flags) if directory else None
            try:
                source.provider.rename(source.node, name, target.node, new_name, flags)
            except OSError:
                if moved is not None:
                    moved()
                raise

    # Attributes.

    def getattr(self, node: Node) -> tuple[Attr, Lifetime]:
        target = self._target(node)
        return self._shown(target, *target.provider.getattr(target.node))

    def setattr(self, node: Node, changes: SetAttr) -> tuple[Attr, Lifetime]:
        target = self._changed(node)
        return self._shown(target, *target.provider.setattr(target.node, changes))

    # Nodes...

    def _target(self, node: Node) -> Target:
        if node % 2:
            return Target(_SHADOW, self._shadow, (node + 1) // 2)
        if node // 2 not in self._given:
            raise refuse(errno.ESTALE)
        return Target(_PRIVATE, self._private, node // 2)

    def _changed(self, node: Node) -> Target:
        """Return what serves a node that is about to change. Only what is private can in a read-only mount."""
        target = self._target(node)
        if target.number == _SHADOW and self._shadow.readonly:
            raise refuse(errno.EROFS)
        return target

    def _path(self, directory: Target, name: bytes) -> Path:
        return self._shadow.place(directory.node).below(name)

    def _told(self, entry: Entry, number: int) -> Entry:
        if number == _SHADOW:
            return Entry(_odd(entry.node), entry.attr, entry.lifetime)
        self._given[entry.node] += 1
        attr = Attributes.of(entry.attr, _FIRST_INO | entry.attr.st_ino)
        return Entry(2 * entry.node, attr, entry.lifetime)

    def _shown(self, target: Target, attr: Attr, lifetime: Lifetime) -> tuple[Attr, Lifetime]:
        return (
            Attributes.of(attr, _FIRST_INO | attr.st_ino) if target.number == _PRIVATE else attr,
            lifetime,
        )

    # Where a name is...

    @contextmanager
    def _place_for(self, parent: Node, name: bytes, *, directory: bool) -> Iterator[Target]:
        """Yield the directory that a new thing goes to."""
        above = self._target(parent)
        if above.number == _PRIVATE:
            yield above
            return
        path = self._path(above, name)
        if self._shadow.patterns.hides(path, directory=directory):
            with self._mirrors.at(path[:-1], make=True) as mirror:
                assert mirror is not None
                yield Target(_PRIVATE, self._private, mirror)
            return
        yield self._changed(parent)

    @contextmanager
    def _place_of(self, parent: Node, name: bytes) -> Iterator[tuple[Target, bool]]:
        """Yield the directory that a thing is in, and whether it is a directory itself."""
        above = self._target(parent)
        if above.number == _SHADOW:
            path = self._path(above, name)
            with self._mirrors.at(path[:-1]) as mirror:
                kind = self._mirrors.kind_of(mirror, path)
                if kind is not None and mirror is not None:
                    yield Target(_PRIVATE, self._private, mirror), kind
                    return
            self._changed(parent)
        entry = above.provider.lookup(above.node, name)
        above.provider.forget(entry.node, 1)
        yield above, stat.S_ISDIR(entry.attr.st_mode)

    def _listed_behind(
        self, mirror: Node | None, path: Path, offset: int, size: int
    ) -> list[DirEntry]:
        entries = self._mirrors.list(mirror, path, offset - _FIRST_OFFSET, size)
        return [_listed(entry, _FIRST_OFFSET) for entry in entries]

    # Moving and removing...

    def _refuse_contents(self, path: Path) -> None:
        """Refuse to remove, or to replace, a directory of the shadow's with private things in it."""
        with self._mirrors.at(path) as mirror:
            if self._mirrors.list(mirror, path, 0, 1 << 16):
                raise refuse(errno.ENOTEMPTY)

    def _rename_private(
        self, old: tuple[Node, Target, bytes], new: tuple[Node, Target, bytes], flags: int
    ) -> None:
        (parent, source, name), (new_parent, target, new_name) = old, new
        if flags & RENAME_EXCHANGE and (parent % 2 or new_parent % 2):
            raise refuse(errno.EINVAL)  # what comes back need not be hidden there
        self._private.rename(source.node, name, target.node, new_name, flags)

    def _move_mirror(
        self, source: Target, name: bytes, target: Target, new_name: bytes, flags: int
    ) -> Callable[[], None] | None:
        """Move what mirrors a directory that is about to move; return what undoes it, None when there is none."""
        old, new = self._path(source, name), self._path(target, new_name)
        if old == new:
            return None
        with self._mirrors.at(old) as mirror, self._mirrors.at(new) as other:
            if flags & RENAME_EXCHANGE and not mirror is other is None:
                raise refuse(errno.EINVAL)
            self._refuse_contents(new)
            if mirror is None:
                return None
            self._mirrors.refuse_exposure(mirror, old, new)
        self._mirrors.move(old, new)
        return lambda: self._mirrors.move(new, old)


def _odd(node: Node) -> Node:
    return 2 * node - 1


def _listed(entry: DirEntry, offset: int = 0) -> DirEntry:
    return DirEntry(entry.name, _FIRST_INO | entry.ino, entry.kind, offset + entry.offset)
