"""One file of the host as a provider, mounted on a file of the guest. What is beside it does not exist for the guest.

Rule 1: the only node is the root, and stands for whatever has the file's name now: editors save by putting a new file
    in the place of the old one, which for a kernel would be the end of a mount's root.
Rule 2: while a directory or a link has the name, or nothing has, the guest finds nothing (ENOENT).
Rule 3: it is reached as HostDir reaches it, which serves the directory to this object and to nobody else.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Self, get_args

import msgspec

from taskvm.errors import UsageError
from taskvm.fs.hostdir import HostDir, resolve_host_path
from taskvm.fs.provider import ROOT, Change, Node, Provider, Source, refuse
from taskvm.wire.fuse import SetAttr
from taskvm.wire.fuse_replies import Attr, Lifetime, StatFs

FileMode = Literal["direct", "ro"]


class HostFileState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a mounted file is saved with its guest."""

    directory: bytes
    file: Node | None


class HostFile(Provider):
    """Serves the regular file `path`, which must exist, and nothing beside it; `mode` "ro" refuses every change.

    It is mounted on a file: `mounts={"/etc/app.conf": HostFile("~/app.conf")}`. What the host puts in its place is
    what the guest sees from then on.
    """

    is_file = True

    def __init__(self, path: str | os.PathLike[str], *, mode: FileMode = "direct") -> None:
        operation = f"serve the file {os.fspath(path)}"
        if mode not in get_args(FileMode):
            raise UsageError(operation, f"mode {mode!r} does not exist", "Use direct or ro")
        self.path = _resolve(path, operation)
        self.mode = mode
        self._directory: Provider = HostDir(self.path.parent, mode=mode)
        self._begin(self._directory)

    def _begin(self, directory: Provider) -> None:
        self._directory = directory
        self._directory.changes = self._heard
        self.readonly = directory.readonly
        self.xattrs = directory.xattrs
        self.prompt = directory.prompt
        self._name = os.fsencode(self.path.name)
        self._node: Node | None = None  # what has the name, with one reference
        self._doubted = False

    def __repr__(self) -> str:
        return f"HostFile({str(self.path)!r}, mode={self.mode!r})"

    def opened(self) -> Self:
        served = type(self).__new__(type(self))
        served.path, served.mode = self.path, self.mode
        served._begin(self._directory.opened())
        return served

    def close(self) -> None:
        self._directory.close()

    def sources(self) -> Sequence[Source]:
        return self._directory.sources()

    def rest(self) -> None:
        self._directory.rest()

    def export_state(self) -> bytes:
        state = HostFileState(directory=self._directory.export_state(), file=self._node)
        return msgspec.msgpack.encode(state)

    def import_state(self, state: bytes) -> None:
        saved = msgspec.msgpack.decode(state, type=HostFileState)
        self._node, self._doubted = saved.file, True
        self._directory.import_state(saved.directory)

    # Attributes.

    def getattr(self, node: Node) -> tuple[Attr, Lifetime]:
        _only(node)
        return self._look()

    def setattr(self, node: Node, changes: SetAttr) -> tuple[Attr, Lifetime]:
        return self._directory.setattr(self._file(node), changes)

    def statfs(self, node: Node) -> StatFs:
        _only(node)
        return self._directory.statfs(ROOT)

    def getxattr(self, node: Node, name: bytes) -> bytes:
        return self._directory.getxattr(self._file(node), name)

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        self._directory.setxattr(self._file(node), name, value, flags)

    def listxattr(self, node: Node) -> list[bytes]:
        return self._directory.listxattr(self._file(node))

    def removexattr(self, node: Node, name: bytes) -> None:
        self._directory.removexattr(self._file(node), name)

    # Contents.

    def read(self, node: Node, offset: int, size: int) -> bytes:
        return self._directory.read(self._file(node), offset, size)

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        return self._directory.write(self._file(node), offset, data, append=append)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        self._directory.fsync(self._file(node), data_only=data_only)

    def sync_later(self, node: Node, *, data_only: bool) -> Callable[[], None] | None:
        return self._directory.sync_later(self._file(node), data_only=data_only)

    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        self._directory.allocate(self._file(node), offset, length, mode)

    def seek(self, node: Node, offset: int, whence: int) -> int:
        return self._directory.seek(self._file(node), offset, whence)

    def copy_range(
        self, node: Node, offset: int, target: Node, target_offset: int, length: int
    ) -> int:
        source, into = self._file(node), self._file(target)
        return self._directory.copy_range(source, offset, into, target_offset, length)

    # What has the name...

    def _file(self, node: Node) -> Node:
        """Return the directory's node of the file that has the name."""
        _only(node)
        if self._node is None or self._doubted:
            self._look()
        if self._node is None:
            raise refuse(errno.ENOENT)
        return self._node

    def _look(self) -> tuple[Attr, Lifetime]:
        """Look at what has the name now; ENOENT unless it is a regular file."""
        before, told = self._node, self._doubted
        self._node, self._doubted = None, False
        try:
            entry = self._directory.lookup(ROOT, self._name)
        finally:
            if before is not None:
                self._directory.forget(before, 1)
        if not stat.S_ISREG(entry.attr.st_mode):
            self._directory.forget(entry.node, 1)
            raise refuse(errno.ENOENT)
        self._node = entry.node
        if not told and before not in (None, entry.node):
            self.changes(
                Change(ROOT)
            )  # where nobody watches, this is the first that is heard of it
        return entry.attr, entry.lifetime

    def _heard(self, change: Change) -> None:
        """Tell of a change in the directory, if it is one of the file."""
        renamed = (change.node, change.name) == (ROOT, self._name)
        changed = change.name is None and change.node == self._node
        if (renamed or changed) and not self._doubted:  # else it was told, and has not looked since
            self._doubted = True
            self.changes(Change(ROOT))


def _only(node: Node) -> None:
    if node != ROOT:
        raise refuse(errno.ESTALE)


def _resolve(path: str | os.PathLike[str], operation: str) -> Path:
    resolved = resolve_host_path(path, operation)
    if not resolved.is_file():
        raise UsageError(operation, "it is not a regular file", "Mount a directory with HostDir")
    return resolved
