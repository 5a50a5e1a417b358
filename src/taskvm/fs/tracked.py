"""A wrapper that knows under which path the guest knows each node: the base class of those that judge by path.

Rule 1: every operation on a node asks `place` for it first, so only what was handed out can be used.
Rule 2: references that the guest drops reach the inner provider when the place is dropped, all at once.
"""

from __future__ import annotations

import stat
from collections.abc import Callable

import msgspec

from taskvm.fs.places import Place, Places, PlaceState
from taskvm.fs.provider import DirEntry, Entry, Node
from taskvm.fs.syscalls import RENAME_EXCHANGE
from taskvm.fs.wrapper import Wrapper
from taskvm.wire.fuse import SetAttr
from taskvm.wire.fuse_replies import Attr, Lifetime, StatFs


class TrackedState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is saved with the guest: what the inner provider says, and what the guest knows."""

    inner: bytes
    places: list[PlaceState]


class Tracked(Wrapper):
    """Serves what `inner` serves, and keeps `places`."""

    def begin(self) -> None:
        super().begin()
        self.places = Places()

    def export_state(self) -> bytes:
        state = TrackedState(inner=self.inner.export_state(), places=self.places.export())
        return msgspec.msgpack.encode(state)

    def import_state(self, state: bytes) -> None:
        saved = msgspec.msgpack.decode(state, type=TrackedState)
        self.places.restore(saved.places)
        self.inner.import_state(saved.inner)

    def place(self, node: Node) -> Place:
        """Return what the guest knows as `node`; ESTALE when it knows nothing by that number."""
        return self.places[node]

    def bound(self, parent: Place, name: bytes, entry: Entry) -> Entry:
        """Note what the guest is about to be told, and return it."""
        directory = stat.S_ISDIR(entry.attr.st_mode)
        self.places.bind(parent, name, entry.node, directory=directory)
        return entry

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        place = self.place(parent)
        try:
            return self.bound(place, name, self.inner.lookup(parent, name))
        except FileNotFoundError:
            self.places.unbind(place, name)
            raise

    def forget(self, node: Node, count: int) -> None:
        for gone in self.places.forget(node, count):
            self.inner.forget(gone.node, gone.handed)

    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        self.place(node)
        return self.inner.readdir(node, offset, size)

    def readlink(self, node: Node) -> bytes:
        self.place(node)
        return self.inner.readlink(node)

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        place = self.place(parent)
        return self.bound(place, name, self.inner.create(parent, name, mode, flags))

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        place = self.place(parent)
        return self.bound(place, name, self.inner.mknod(parent, name, mode))

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        place = self.place(parent)
        return self.bound(place, name, self.inner.mkdir(parent, name, mode))

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        place = self.place(parent)
        return self.bound(place, name, self.inner.symlink(parent, name, target))

    def link(self, node: Node, parent: Node, name: bytes) -> Entry:
        self.place(node)
        place = self.place(parent)
        return self.bound(place, name, self.inner.link(node, parent, name))

    def unlink(self, parent: Node, name: bytes) -> None:
        place = self.place(parent)
        self.inner.unlink(parent, name)
        self.places.unbind(place, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        place = self.place(parent)
        self.inner.rmdir(parent, name)
        self.places.unbind(place, name)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        old, new = self.place(parent), self.place(new_parent)
        moved, there = old.children.get(name), new.children.get(new_name)
        self.inner.rename(parent, name, new_parent, new_name, flags)
        if flags & RENAME_EXCHANGE:
            self.places.exchange(old, name, new, new_name)
        elif moved is None or moved is not there:  # two names of one file: rename(2) does nothing
            self.places.move(old, name, new, new_name)

    # Attributes.

    def getattr(self, node: Node) -> tuple[Attr, Lifetime]:
        self.place(node)
        return self.inner.getattr(node)

    def setattr(self, node: Node, changes: SetAttr) -> tuple[Attr, Lifetime]:
        self.place(node)
        return self.inner.setattr(node, changes)

    def statfs(self, node: Node) -> StatFs:
        self.place(node)
        return self.inner.statfs(node)

    def getxattr(self, node: Node, name: bytes) -> bytes:
        self.place(node)
        return self.inner.getxattr(node, name)

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        self.place(node)
        self.inner.setxattr(node, name, value, flags)

    def listxattr(self, node: Node) -> list[bytes]:
        self.place(node)
        return self.inner.listxattr(node)

    def removexattr(self, node: Node, name: bytes) -> None:
        self.place(node)
        self.inner.removexattr(node, name)

    # Contents.

    def read(self, node: Node, offset: int, size: int) -> bytes:
        self.place(node)
        return self.inner.read(node, offset, size)

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        self.place(node)
        return self.inner.write(node, offset, data, append=append)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        self.place(node)
        self.inner.fsync(node, data_only=data_only)

    def sync_later(self, node: Node, *, data_only: bool) -> Callable[[], None] | None:
        self.place(node)
        return super().sync_later(node, data_only=data_only)

    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        self.place(node)
        self.inner.allocate(node, offset, length, mode)

    def seek(self, node: Node, offset: int, whence: int) -> int:
        self.place(node)
        return self.inner.seek(node, offset, whence)

    def copy_range(
        self, node: Node, offset: int, target: Node, target_offset: int, length: int
    ) -> int:
        self.place(node)
        self.place(target)
        return self.inner.copy_range(node, offset, target, target_offset, length)
