"""A provider written in terms of paths, for what is no file system: a store of objects, a database, a dictionary.

Derive from PathProvider and define `stat`, `list` and `read_file`; with `write_file` it can be written to as well, and
with each of the other methods it can do more. All of them may be coroutines: they run on an event loop of this mount's
own, one at a time, each for at most `deadline_s` (then the guest gets ETIMEDOUT), and a request, which may take
several, for at most `request_deadline_s`; the other mounts of this sandbox do not wait. Paths are absolute, `/` is the
root, and no part of one is empty, `.` or `..`; what is not there is FileNotFoundError.

There are no links, permissions, times or attributes to set, and a file that is removed is gone for who has it open.
"""

from __future__ import annotations

import asyncio
import builtins
import copy
import errno
import hashlib
import os
import stat
from collections.abc import Awaitable, Iterable
from typing import ClassVar, Self, TypeVar

import msgspec

from taskvm.fs.attributes import BLOCK, Attributes
from taskvm.fs.places import Place, Places, PlaceState
from taskvm.fs.provider import ROOT, Change, DirEntry, Entry, Node, Provider, refuse
from taskvm.fs.syscalls import RENAME_NOREPLACE
from taskvm.wire.fuse import SetAttr, SetAttrField
from taskvm.wire.fuse_replies import Lifetime, StatFs

T = TypeVar("T")
DEADLINE_S = 30.0
MAX_NAME = 255
# A guest that never forgets is stopped here, as in fs/nodes.py.
MAX_NODES = 1_000_000
_MANY = 1 << 40  # blocks and files, where nobody counts them


class PathStat(msgspec.Struct, frozen=True, kw_only=True):
    """What is at a path. `mode` has the permission bits; None is the usual ones."""

    size: int = 0
    directory: bool = False
    mtime_ns: int = 0
    mode: int | None = None


class PathProviderState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a mount is saved with its guest: which path each number is. What is there belongs to somebody else."""

    following: Node
    places: list[PlaceState]
    cookies: dict[Node, list[tuple[bytes, int]]]


class PathProvider(Provider):
    """Serves what methods of yours tell about paths; see the module, and the page on files for an example."""

    xattrs = False
    deadline_s: ClassVar[float] = DEADLINE_S
    """How long a coroutine may take."""
    lifetime_s: ClassVar[float] = 1.0
    """How long the guest may believe what it was told."""

    # What you define.

    def stat(self, path: str) -> PathStat | Awaitable[PathStat]:
        """Return what is at `path`; FileNotFoundError when nothing. "/" is a directory."""
        raise NotImplementedError

    def list(self, path: str) -> Iterable[str] | Awaitable[Iterable[str]]:
        """Return the names in a directory."""
        raise NotImplementedError

    def read_file(self, path: str, offset: int, size: int) -> bytes | Awaitable[bytes]:
        """Return up to `size` bytes; fewer only at the end."""
        raise NotImplementedError

    def write_file(self, path: str, offset: int, data: bytes) -> Awaitable[None] | None:
        """Write all of `data`; `offset` is never beyond the end."""
        raise refuse(errno.EROFS)

    def make(self, path: str, *, directory: bool) -> Awaitable[None] | None:
        """Make an empty file or directory; nothing is there."""
        raise refuse(errno.EPERM)

    def resize(self, path: str, size: int) -> Awaitable[None] | None:
        """Cut a file, or fill it up with zeros."""
        raise refuse(errno.EPERM)

    def remove(self, path: str, *, directory: bool) -> Awaitable[None] | None:
        """Remove a file, or an empty directory."""
        raise refuse(errno.EPERM)

    def move(self, path: str, new_path: str) -> Awaitable[None] | None:
        """Move a file, or a directory with all that is in it; nothing is at `new_path`."""
        raise refuse(errno.EPERM)

    # The mount.

    _places: Places
    _runner: asyncio.Runner | None = None

    @property
    def readonly(self) -> bool:  # type: ignore[override]  # asked, never set
        return type(self).write_file is PathProvider.write_file

    def opened(self) -> Self:
        served = copy.copy(self)
        served._places = Places()
        served._runner = None
        served._next = ROOT + 1
        served._cookies = {}
        return served

    def export_state(self) -> bytes:
        cookies = {
            node: [(os.fsencode(name), cookie) for name, cookie in known.items()]
            for node, known in self._cookies.items()
        }
        state = PathProviderState(
            following=self._next, places=self._places.export(), cookies=cookies
        )
        return msgspec.msgpack.encode(state)

    def import_state(self, state: bytes) -> None:
        saved = msgspec.msgpack.decode(state, type=PathProviderState)
        self._places.restore(saved.places)
        self._next = saved.following
        self._cookies = {
            node: {os.fsdecode(name): cookie for name, cookie in known}
            for node, known in saved.cookies.items()
        }
        for place in saved.places:  # nobody knows what has changed meanwhile
            self.changes(Change(place.node))
            for parent, name in place.names:
                self.changes(Change(parent, name))

    def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    _next: Node
    _cookies: dict[
        Node, dict[str, int]
    ]  # of the names in a directory, in the order of their listing

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        return self._found(self._places[parent], name)

    def forget(self, node: Node, count: int) -> None:
        for gone in self._places.forget(node, count):
            self._cookies.pop(gone.node, None)

    def readdir(self, node: Node, offset: int, size: int) -> builtins.list[DirEntry]:
        path = self._path(node)
        if not self._stat(path).directory:
            raise refuse(errno.ENOTDIR)
        cookies = self._cookies.setdefault(node, {})
        if offset == 0:
            self._refresh(cookies, self._done(self.list(path)))
        entries = [
            DirEntry(name, _ino(path), stat.S_IFDIR >> 12, n) for n, name in ((1, b"."), (2, b".."))
        ]
        entries = [entry for entry in entries if entry.offset > offset]
        for name, cookie in cookies.items():
            if cookie > offset:
                entries.append(DirEntry(os.fsencode(name), _ino(_join(path, name)), 0, cookie))
                size -= 24 + len(name)
                if size < 0:
                    break
        return entries

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        place, path = self._new(parent, name)
        there = self._stat_or_none(path)
        if there is None:
            self._done(self.make(path, directory=False))
        elif flags & os.O_EXCL or there.directory:
            raise refuse(errno.EEXIST)
        elif flags & os.O_TRUNC:
            self._done(self.resize(path, 0))
        return self._found(place, name)

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise refuse(errno.EPERM)
        return self.create(parent, name, mode, os.O_EXCL)

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        place, path = self._new(parent, name)
        if self._stat_or_none(path) is not None:
            raise refuse(errno.EEXIST)
        self._done(self.make(path, directory=True))
        return self._found(place, name)

    def unlink(self, parent: Node, name: bytes) -> None:
        place, path = self._new(parent, name)
        if self._stat(path).directory:
            raise refuse(errno.EISDIR)
        self._remove(place, name, path, directory=False)

    def rmdir(self, parent: Node, name: bytes) -> None:
        place, path = self._new(parent, name)
        self._refuse_removal(path)
        self._remove(place, name, path, directory=True)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        if flags & ~RENAME_NOREPLACE:
            raise refuse(errno.EINVAL)
        (old, path), (new, new_path) = self._new(parent, name), self._new(new_parent, new_name)
        moved, there = self._stat(path), self._stat_or_none(new_path)
        if moved.directory and f"{new_path}/".startswith(f"{path}/") and path != new_path:
            raise refuse(errno.EINVAL)
        if there is not None:
            if flags:
                raise refuse(errno.EEXIST)
            if path == new_path:
                return
            if moved.directory:
                self._refuse_removal(new_path)
            elif there.directory:
                raise refuse(errno.EISDIR)
            self._remove(new, new_name, new_path, directory=there.directory)
        self._done(self.move(path, new_path))
        self._places.move(old, name, new, new_name)

    # Attributes.

    def getattr(self, node: Node) -> tuple[Attributes, Lifetime]:
        path = self._path(node)
        return self._attributes(path, self._stat(path)), self._lifetime

    def setattr(self, node: Node, changes: SetAttr) -> tuple[Attributes, Lifetime]:
        path, valid = self._path(node), changes.valid
        attributes = self._attributes(path, self._stat(path))
        for given, asked, has in (
            (SetAttrField.UID, changes.uid, attributes.st_uid),
            (SetAttrField.GID, changes.gid, attributes.st_gid),
        ):
            if valid & given and asked != has:
                raise refuse(errno.EPERM)
        if valid & SetAttrField.SIZE:
            self._refuse_directory(path)
            self._done(self.resize(path, changes.size))
        return self.getattr(node)  # permissions and times are not kept, as on vfat

    def statfs(self, node: Node) -> StatFs:
        return StatFs(
            blocks=_MANY, free=_MANY, available=_MANY, files=_MANY, files_free=_MANY,
            block_size=BLOCK, fragment_size=BLOCK, max_name=MAX_NAME,
        )  # fmt: skip

    # Contents.

    def read(self, node: Node, offset: int, size: int) -> bytes:
        path = self._path(node)
        self._refuse_directory(path)
        return self._done(self.read_file(path, offset, size))[:size]

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        path = self._path(node)
        size = self._refuse_directory(path).size
        start = size if append else offset
        if start > size:
            self._done(self.resize(path, start))
        self._done(self.write_file(path, start, bytes(data)))
        return len(data)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        self._path(node)

    # Calling what you defined...

    def _done(self, answer: T | Awaitable[T]) -> T:
        """Return an answer, waiting for it where it is a coroutine's."""
        if not isinstance(answer, Awaitable):
            return answer
        self._runner = self._runner or asyncio.Runner()
        try:
            result: T = self._runner.run(_in_time(answer, self.deadline_s))
        except TimeoutError:
            raise refuse(errno.ETIMEDOUT) from None
        return result

    def _stat(self, path: str) -> PathStat:
        try:
            return self._done(self.stat(path))
        except FileNotFoundError:
            raise refuse(errno.ENOENT) from None

    def _stat_or_none(self, path: str) -> PathStat | None:
        try:
            return self._stat(path)
        except FileNotFoundError:
            return None

    def _refuse_directory(self, path: str) -> PathStat:
        told = self._stat(path)
        if told.directory:
            raise refuse(errno.EISDIR)
        return told

    def _refuse_removal(self, path: str) -> None:
        if not self._stat(path).directory:
            raise refuse(errno.ENOTDIR)
        if any(True for _ in self._done(self.list(path))):
            raise refuse(errno.ENOTEMPTY)

    def _remove(self, parent: Place, name: bytes, path: str, *, directory: bool) -> None:
        self._done(self.remove(path, directory=directory))
        self._places.unbind(parent, name)

    # Paths and nodes...

    def _path(self, node: Node) -> str:
        """Return where a node is; ESTALE when it was removed, for then something else may be there."""
        place = self._places[node]
        if node == ROOT:
            return "/"
        if not place.names:
            raise refuse(errno.ESTALE)
        parent, name = place.names[-1]
        return _render(parent.below(name))

    def _new(self, parent: Node, name: bytes) -> tuple[Place, str]:
        if len(name) > MAX_NAME:
            raise refuse(errno.ENAMETOOLONG)
        place = self._places[parent]
        if parent != ROOT:
            self._path(parent)
        return place, _render(place.below(name))

    def _found(self, parent: Place, name: bytes) -> Entry:
        _place, path = self._new(parent.node, name)
        if not parent.directory:
            raise refuse(errno.ENOTDIR)
        try:
            told = self._stat(path)
        except FileNotFoundError:
            self._places.unbind(parent, name)
            raise
        known = parent.children.get(name)
        if known is not None and known.directory == told.directory:
            node = known.node
        elif len(self._places) >= MAX_NODES:
            raise refuse(errno.ENFILE)
        else:
            node, self._next = self._next, self._next + 1
        self._places.bind(parent, name, node, directory=told.directory)
        return Entry(node, self._attributes(path, told), self._lifetime)

    def _attributes(self, path: str, told: PathStat) -> Attributes:
        usual = 0o755 if told.directory else 0o644
        mode = (usual if told.mode is None else told.mode) & 0o1777
        kind = stat.S_IFDIR if told.directory else stat.S_IFREG
        size = 0 if told.directory else told.size
        return Attributes.made(_ino(path), kind | mode, size=size, mtime_ns=told.mtime_ns)

    @property
    def _lifetime(self) -> Lifetime:
        lifetime_ns = int(self.lifetime_s * 1e9)
        return Lifetime(entry_ns=lifetime_ns, attr_ns=lifetime_ns)

    @staticmethod
    def _refresh(cookies: dict[str, int], names: Iterable[str]) -> None:
        """Give new names a place behind all others, and keep that of the others: a listing under way goes on."""
        present = {name for name in names if name not in ("", ".", "..") and "/" not in name}
        following = max(cookies.values(), default=2) + 1
        for name in cookies.keys() - present:
            del cookies[name]
        new = sorted(present - cookies.keys())
        cookies |= {name: number for number, name in enumerate(new, start=following)}


async def _in_time(answer: Awaitable[T], deadline_s: float) -> T:
    async with asyncio.timeout(deadline_s):
        return await answer


def _render(path: tuple[bytes, ...]) -> str:
    return "/" + os.fsdecode(b"/".join(path))


def _join(path: str, name: str) -> str:
    return f"{path.rstrip('/')}/{name}"


def _ino(path: str) -> int:
    """Return the same number for the same path, at each mount."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=7).digest()) or 1
