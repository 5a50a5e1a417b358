"""A provider that a guest can make grow only so far.

Counted is what the guest adds: bytes by the lengths of files, holes included, of links' targets and of extended
attributes; and files, directories and links by their number. What it removes is given back, what was there before
too; a removed file that is still open counts until the guest lets go of it. What others change meanwhile is not seen.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from taskvm.errors import UsageError
from taskvm.fs.provider import Entry, Node, Provider, refuse
from taskvm.fs.syscalls import RENAME_EXCHANGE
from taskvm.fs.tracked import Tracked
from taskvm.wire.fuse import SetAttr, SetAttrField
from taskvm.wire.fuse_replies import Attr, Lifetime, StatFs

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # fallocate(2)


class Quota(Tracked):
    """Serves `inner`, which a guest may make grow by at most so many bytes and files; beyond that it gets EDQUOT."""

    def __init__(
        self,
        inner: Provider,
        *,
        limit_bytes: int | None = None,
        limit_files: int | None = None,
    ) -> None:
        for name, limit in (("bytes", limit_bytes), ("files", limit_files)):
            if limit is not None and limit < 0:
                raise UsageError(f"limit a mount to {limit} {name}", "it is negative")
        self._limits = (limit_bytes, limit_files)
        super().__init__(inner)

    @property
    def prompt(self) -> bool:  # type: ignore[override]  # as in the base class
        return self.inner.prompt

    def begin(self) -> None:
        super().begin()
        self.used_bytes: int = 0
        self.used_files: int = 0
        self._removed: set[Node] = set()  # but still known to the guest
        self._attributed = False  # whether the guest has set any attribute

    def export_state(self) -> bytes:
        counted = (self.used_bytes, self.used_files, self._removed, self._attributed)
        return msgspec.msgpack.encode((super().export_state(), *counted))

    def import_state(self, state: bytes) -> None:
        saved = msgspec.msgpack.decode(state, type=tuple[bytes, int, int, set[int], bool])
        super().import_state(saved[0])
        self.used_bytes, self.used_files, self._removed, self._attributed = saved[1:]

    # Names.

    def forget(self, node: Node, count: int) -> None:
        for gone in self.places.forget(node, count):
            if gone.node in self._removed:
                self._removed.discard(gone.node)
                self._give_back(gone.node)
            self.inner.forget(gone.node, gone.handed)

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        with self._found(parent, name) as there:
            if there is None:
                self._refuse(files=1)
            entry = super().create(parent, name, mode, flags)
        if there is None:
            self._take(files=1)
        elif flags & os.O_TRUNC:
            self._take(entry.attr.st_size - there.attr.st_size)
        return entry

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        self._refuse(files=1)
        entry = super().mknod(parent, name, mode)
        self._take(files=1)
        return entry

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        self._refuse(files=1)
        entry = super().mkdir(parent, name, mode)
        self._take(files=1)
        return entry

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        self._refuse(len(target), files=1)
        entry = super().symlink(parent, name, target)
        self._take(entry.attr.st_size, files=1)
        return entry

    def unlink(self, parent: Node, name: bytes) -> None:
        with self._found(parent, name) as there:
            super().unlink(parent, name)
            self._remove(there)

    def rmdir(self, parent: Node, name: bytes) -> None:
        with self._found(parent, name) as there:
            super().rmdir(parent, name)
            self._remove(there)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        with self._found(parent, name) as moved, self._found(new_parent, new_name) as there:
            super().rename(parent, name, new_parent, new_name, flags)
            same = moved is None or there is None or moved.node == there.node
            if not same and not flags & RENAME_EXCHANGE:
                self._remove(there)

    # Attributes.

    def setattr(self, node: Node, changes: SetAttr) -> tuple[Attr, Lifetime]:
        if not changes.valid & SetAttrField.SIZE:
            return super().setattr(node, changes)
        before = self._size(node)
        self._refuse(changes.size - before)
        told = super().setattr(node, changes)
        self._take(told[0].st_size - before)
        return told

    def statfs(self, node: Node) -> StatFs:
        told, (size, files) = super().statfs(node), self._limits
        fields = {name: getattr(told, name) for name in told.__struct_fields__}
        if size is not None:
            left = max(0, size - self.used_bytes) // told.fragment_size
            free, available = min(told.free, left), min(told.available, left)
            used = max(0, self.used_bytes) // told.fragment_size
            fields |= {"free": free, "available": available, "blocks": used + free}
        if files is not None:
            left = min(told.files_free, max(0, files - self.used_files))
            fields |= {"files_free": left, "files": max(0, self.used_files) + left}
        return StatFs(**fields)

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        growth = len(name) + len(value) - self._attribute_size(node, name)
        self._refuse(growth)
        super().setxattr(node, name, value, flags)
        self._attributed = True
        self._take(growth)

    def removexattr(self, node: Node, name: bytes) -> None:
        size = self._attribute_size(node, name)
        super().removexattr(node, name)
        self._take(-size)

    # Contents.

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        before = self._size(node)
        self._refuse((before if append else offset) + len(data) - before)
        written = super().write(node, offset, data, append=append)
        self._take(max(0, (before if append else offset) + written - before))
        return written

    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        if mode not in (0, _PUNCH_HOLE | _KEEP_SIZE):
            raise refuse(errno.EOPNOTSUPP)  # what it takes would not show in the length
        before = self._size(node)
        if not mode:
            self._refuse(offset + length - before)
        super().allocate(node, offset, length, mode)
        self._take(self._size(node) - before)

    def copy_range(
        self, node: Node, offset: int, target: Node, target_offset: int, length: int
    ) -> int:
        before = self._size(target)
        available = max(0, min(length, self._size(node) - offset))
        self._refuse(target_offset + available - before)
        copied = super().copy_range(node, offset, target, target_offset, available)
        self._take(self._size(target) - before)
        return copied

    # Counting...

    def _refuse(self, more: int = 0, *, files: int = 0) -> None:
        """Refuse before anything is done; shrinking is never refused."""
        size_limit, files_limit = self._limits
        too_large = size_limit is not None and more > 0 and self.used_bytes + more > size_limit
        too_many = files_limit is not None and files > 0 and self.used_files + files > files_limit
        if too_large or too_many:
            raise refuse(errno.EDQUOT)

    def _take(self, more: int = 0, *, files: int = 0) -> None:
        self.used_bytes += more
        self.used_files += files

    @contextmanager
    def _found(self, parent: Node, name: bytes) -> Iterator[Entry | None]:
        """Yield what a name stands for, without telling the guest. Its node stays the same meanwhile."""
        self.place(parent)
        try:
            entry = self.inner.lookup(parent, name)
        except FileNotFoundError:
            yield None
            return
        try:
            yield entry
        finally:
            self.inner.forget(entry.node, 1)

    def _remove(self, found: Entry | None) -> None:
        """Count what has lost a name; what the guest still knows can be open and grow on."""
        if found is None:
            return
        if found.attr.st_nlink > 1 and not stat.S_ISDIR(found.attr.st_mode):
            return
        if self.places.knows(found.node):
            self._removed.add(found.node)
        else:
            self._take(-self._counted(found.attr), files=-1)

    def _give_back(self, node: Node) -> None:
        try:
            size = self._counted(self.inner.getattr(node)[0])
            if self._attributed:
                size += sum(self._attribute_size(node, name) for name in self._attributes(node))
        except OSError:
            size = 0  # nobody can say any more: it stays counted
        self._take(-size, files=-1)

    @staticmethod
    def _counted(attr: Attr) -> int:
        return attr.st_size if stat.S_IFMT(attr.st_mode) in (stat.S_IFREG, stat.S_IFLNK) else 0

    def _size(self, node: Node) -> int:
        self.place(node)
        return self.inner.getattr(node)[0].st_size

    def _attributes(self, node: Node) -> list[bytes]:
        return self.inner.listxattr(node)

    def _attribute_size(self, node: Node, name: bytes) -> int:
        try:
            return len(name) + len(self.inner.getxattr(node, name))
        except OSError:
            return 0
