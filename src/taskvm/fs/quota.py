"""A provider that a guest can make grow only so far.

Counted is what the guest adds: bytes as its files and directories take them of a disk (fs/charges.py), and names, of
files, directories, symbolic and hard links. What it removes is given back, what was there before too; a removed file
that is still open counts until the guest lets go of it. What others change meanwhile is not seen.

How much a directory grows by a name shows afterwards only: a guest can exceed the limit by one directory's next block.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import msgspec

from taskvm.errors import UsageError
from taskvm.fs.attributes import BLOCK
from taskvm.fs.charges import Charge, Charges
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
        self.used_files: int = 0
        self.charges = Charges()  # of nothing, without a limit of bytes
        self._removed: dict[Node, int] = {}  # nodes still known to the guest -> their inode numbers

    def export_state(self) -> bytes:
        counted = (self.charges.used, self.charges.by_ino, self.used_files, self._removed)
        return msgspec.msgpack.encode((super().export_state(), *counted))

    def import_state(self, state: bytes) -> None:
        saved = msgspec.msgpack.decode(
            state, type=tuple[bytes, int, dict[int, Charge], int, dict[int, int]]
        )
        super().import_state(saved[0])
        self.charges.used, self.charges.by_ino, self.used_files, self._removed = saved[1:]

    # Names.

    def forget(self, node: Node, count: int) -> None:
        for gone in self.places.forget(node, count):
            ino = self._removed.pop(gone.node, None)
            if ino is not None:
                self.used_files -= 1
                self.charges.release(ino)
            self.inner.forget(gone.node, gone.handed)

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        with self._found(parent, name) as there:
            if there is not None:
                entry = super().create(parent, name, mode, flags)
                self._settle(there.attr, entry.attr)
                return entry
        self._refuse(BLOCK, names=1)
        with self._growing(parent):
            return self._added(super().create(parent, name, mode, flags))

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        self._refuse(BLOCK, names=1)
        with self._growing(parent):
            return self._added(super().mknod(parent, name, mode))

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        self._refuse(BLOCK, names=1)
        with self._growing(parent):
            return self._added(super().mkdir(parent, name, mode))

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        self._refuse(max(BLOCK, len(target)), names=1)
        with self._growing(parent):
            return self._added(super().symlink(parent, name, target))

    def link(self, node: Node, parent: Node, name: bytes) -> Entry:
        self._refuse(names=1)
        with self._growing(parent):
            entry = super().link(node, parent, name)
        self.used_files += 1
        return entry

    def unlink(self, parent: Node, name: bytes) -> None:
        with self._found(parent, name) as there, self._growing(parent):
            super().unlink(parent, name)
            self._remove(there)

    def rmdir(self, parent: Node, name: bytes) -> None:
        with self._found(parent, name) as there, self._growing(parent):
            super().rmdir(parent, name)
            self._remove(there)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        with self._found(parent, name) as moved, self._found(new_parent, new_name) as there:
            if there is None:
                self._refuse(names=0)
            left = nullcontext() if parent == new_parent else self._growing(parent)
            with left, self._growing(new_parent):
                super().rename(parent, name, new_parent, new_name, flags)
            same = moved is None or there is None or moved.node == there.node
            if not same and not flags & RENAME_EXCHANGE:
                self._remove(there)

    # Attributes.

    def setattr(self, node: Node, changes: SetAttr) -> tuple[Attr, Lifetime]:
        if not changes.valid & SetAttrField.SIZE or not self._counts_bytes:
            return super().setattr(node, changes)
        before = self._attr(node)
        self._refuse(self.charges.growth(before, changes.size, 0))
        told = super().setattr(node, changes)
        self._settle(before, told[0])
        return told

    def statfs(self, node: Node) -> StatFs:
        told, (size, files) = super().statfs(node), self._limits
        fields = {name: getattr(told, name) for name in told.__struct_fields__}
        if size is not None:
            left = max(0, size - self.charges.used) // told.fragment_size
            free, available = min(told.free, left), min(told.available, left)
            used = max(0, self.charges.used) // told.fragment_size
            fields |= {"free": free, "available": available, "blocks": used + free}
        if files is not None:
            left = min(told.files_free, max(0, files - self.used_files))
            fields |= {"files_free": left, "files": max(0, self.used_files) + left}
        return StatFs(**fields)

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        if not self._counts_bytes:
            super().setxattr(node, name, value, flags)
            return
        attr, more = self._attr(node), len(name) + len(value) - self._attribute_size(node, name)
        self._refuse(self.charges.attribute_growth(attr, more))
        super().setxattr(node, name, value, flags)
        self.charges.settle_attributes(attr, more)

    def removexattr(self, node: Node, name: bytes) -> None:
        size = self._attribute_size(node, name)
        super().removexattr(node, name)
        if self._counts_bytes:
            self.charges.settle_attributes(self._attr(node), -size)

    # Contents.

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        with self._filling(node, None if append else offset, len(data)):
            return super().write(node, offset, data, append=append)

    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        if mode not in (0, _PUNCH_HOLE | _KEEP_SIZE):
            raise refuse(errno.EOPNOTSUPP)  # what it takes would not show in the length
        with self._filling(node, offset, 0 if mode else length):
            super().allocate(node, offset, length, mode)

    def copy_range(
        self, node: Node, offset: int, target: Node, target_offset: int, length: int
    ) -> int:
        available = max(0, min(length, self._attr(node).st_size - offset))
        with self._filling(target, target_offset, available):
            return super().copy_range(node, offset, target, target_offset, available)

    # Counting...

    @property
    def _counts_bytes(self) -> bool:
        return self._limits[0] is not None

    def _refuse(self, more: int = 0, *, names: int | None = None) -> None:
        """Refuse before anything is done: bytes, names, or the growth of a directory by a name. Shrinking never is."""
        size_limit, files_limit = self._limits
        left = None if size_limit is None else size_limit - self.charges.used
        if left is not None and ((more > 0 and more > left) or (names is not None and left < 0)):
            raise refuse(errno.EDQUOT)
        if files_limit is not None and names and self.used_files + names > files_limit:
            raise refuse(errno.EDQUOT)

    def _added(self, entry: Entry) -> Entry:
        self.used_files += 1
        if self._counts_bytes:
            self.charges.add(entry.attr)
        return entry

    def _settle(self, before: Attr, after: Attr) -> None:
        if self._counts_bytes:
            self.charges.settle(before, after)

    @contextmanager
    def _growing(self, directory: Node) -> Iterator[None]:
        """Count by how much a directory grows with what is done in it."""
        if not self._counts_bytes:
            yield
            return
        before = self._attr(directory)
        yield
        with suppress(OSError):  # it is done, and what is gone takes nothing
            self.charges.settle(before, self._attr(directory))

    @contextmanager
    def _filling(self, node: Node, offset: int | None, size: int) -> Iterator[None]:
        """Refuse what would take too much of the file `node`, and count what was done. None is the end of the file."""
        if not self._counts_bytes:
            yield
            return
        before = self._attr(node)
        start = before.st_size if offset is None else offset
        self._refuse(self.charges.growth(before, start, size))
        yield
        self.charges.settle(before, self._attr(node))

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
            self.used_files -= 1
        elif self.places.knows(found.node):
            self._removed[found.node] = found.attr.st_ino
            if self._counts_bytes:
                self.charges.keep(found.attr)
        else:
            self.used_files -= 1
            if self._counts_bytes:
                self.charges.remove(found.attr)

    def _attr(self, node: Node) -> Attr:
        self.place(node)
        return self.inner.getattr(node)[0]

    def _attribute_size(self, node: Node, name: bytes) -> int:
        try:
            return len(name) + len(self.inner.getxattr(node, name))
        except OSError:
            return 0
