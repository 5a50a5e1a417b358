"""Files and whole trees between host and guest, one file at a time: nothing of their size is held in memory.

Rule 1: links in a tree are copied as links. A guest's link that is named as the source is followed by the guest, so
that a copy out is never a link itself; a link of the host is never followed.
Rule 2: what a guest says is hostile. On the host every name is one component below an open descriptor (openat,
O_NOFOLLOW, O_EXCL), only plain files, directories and links are made, never with setuid, and depth, count and bytes
are bounded.
Rule 3: what is copied out appears in one rename, whole, where nothing was; after a failure nothing is left.
Rule 4: a copy in may find its tree changed while it reads (a shared folder): descriptors hold it beneath its root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from taskvm.errors import CopyError, GuestError, HostError, UsageError
from taskvm.filestream import PIECE_BYTES
from taskvm.fs.syscalls import RENAME_NOREPLACE, rename
from taskvm.interruption import in_thread
from taskvm.limits import spare_bytes

if TYPE_CHECKING:
    from taskvm.files import FileInfo, Files

# Each level holds a descriptor, and a process has 1024 of them by default.
MAX_DEPTH = 128
# A guest can invent a tree without end; these end it. A large monorepo with its dependencies has half a million.
MAX_ENTRIES = 1_000_000
MAX_BYTES = 64 * 1024**3
# Between two looks at the free space of the host's disk.
LOOK_BYTES = 64 * 1024**2
# Permissions, without setuid, setgid and sticky.
_PERMISSIONS = 0o777
_SET_IDS = stat.S_ISUID | stat.S_ISGID
_EEXIST = 17
# Times that every host takes: the guest names any 64-bit number.
_MAX_MTIME_NS = 2**31 * 10**9

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO put in a file's place must not hold the opening up.
_OLD_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLimits:
    """How much `copy_out` takes from a guest before it gives up: files, directories and links; bytes of content."""

    max_entries: int = MAX_ENTRIES
    max_bytes: int = MAX_BYTES


class Room:
    """The room on the host's disk while files of a guest are written to `directory`: one may have no end.

    Only where sandboxes have their disks too: they would be ended.
    """

    def __init__(self, directory: Path, operation: str) -> None:
        self._directory = directory
        self._operation = operation
        self._spare = spare_bytes(directory)
        self._unseen = 0

    def take(self, size: int) -> None:
        """Count what is about to be written, and look now and then. Raises CopyError."""
        self._unseen += size
        if not self._spare or self._unseen < LOOK_BYTES:
            return
        self._unseen = 0
        free = shutil.disk_usage(self._directory).free
        if free < self._spare + LOOK_BYTES:
            cause = f"{free >> 20} MiB of this host's disk are free, and {self._spare >> 20} must remain for sandboxes"
            raise CopyError(self._operation, cause, "Free disk space, or copy to another disk")


class CopyOut:
    """One copy from the guest to the host."""

    def __init__(self, files: Files, source: str, target: Path, limits: CopyLimits) -> None:
        self._files = files
        self._source = source.rstrip("/") or "/"
        self._target = target.absolute()
        self._limits = limits
        self._operation = f"copy {source} out to {target}"
        self._entries = 0
        self._bytes = 0
        self._room: Room | None = None

    async def run(self) -> None:
        """Copy. Raises UsageError when the target exists, CopyError for what is not copied, GuestError, HostError."""
        name = self._target.name
        if name in ("", ".."):
            raise UsageError(self._operation, "the target has no name of its own", "Name the copy")
        with _host_errors(self._operation), _opened(self._target.parent, _DIRECTORY) as parent:
            self._room = Room(self._target.parent, self._operation)
            if _is_there(parent, name):
                raise UsageError(self._operation, "the target exists", "Remove it, or name another")
            info = await self._find()
            with _staging(parent) as staging:
                self._count(1)
                await self._entry(info, self._source, staging, "copy", 0)
                rename(staging, b"copy", parent, os.fsencode(name), RENAME_NOREPLACE)

    async def _find(self) -> FileInfo:
        """Return what the source is, or what it leads to."""
        try:
            info = await self._files.stat(self._source)
        except GuestError as error:
            with contextlib.suppress(GuestError):
                link = await self._files.stat(self._source, follow=False)
                if link.target is not None:
                    cause = f"it leads to {link.target!r}: {os.strerror(error.errno)}"
                    raise self._refusal(self._source, cause, "Name another") from error
            raise
        if info.type == "symlink":
            raise self._refusal(self._source, "the guest does not say what it leads to")
        return info

    async def _entry(
        self, info: FileInfo, path: str, directory: int, name: str, depth: int
    ) -> None:
        if info.type == "dir":
            await self._directory(info, path, directory, name, depth)
        elif info.type == "symlink":
            os.symlink(await self._files.readlink(path), name, dir_fd=directory)
        elif info.type == "file":
            await self._file(info, path, directory, name, depth)
        else:
            raise self._refusal(path, f"it is of the type {info.type}")

    async def _directory(
        self, info: FileInfo, path: str, directory: int, name: str, depth: int
    ) -> None:
        if depth == MAX_DEPTH:
            raise self._refusal(path, f"it is more than {MAX_DEPTH} directories deep")
        entries = await self._files.list(path)
        self._count(len(entries))
        os.mkdir(name, 0o700, dir_fd=directory)
        with _opened(name, _DIRECTORY | os.O_NOFOLLOW, directory) as inner:
            for entry in entries:
                below = f"{path.rstrip('/')}/{entry.name}"
                await self._entry(entry, below, inner, entry.name, depth + 1)
            # Its owner can always look into it and remove it.
            os.fchmod(inner, info.mode & _PERMISSIONS | stat.S_IRWXU)
            os.utime(inner, ns=_times(info))

    async def _file(self, info: FileInfo, path: str, directory: int, name: str, depth: int) -> None:
        if info.mode & _SET_IDS:
            raise self._refusal(path, "it is setuid or setgid")
        with _opened(name, _NEW_FILE, directory) as new:
            reading = self._files.open_read(path, follow=depth == 0)
            async with contextlib.aclosing(reading) as pieces:
                async for piece in pieces:
                    self._spend(path, len(piece))
                    await in_thread(_write_all, new, piece)
            os.fchmod(new, info.mode & _PERMISSIONS)
            os.utime(new, ns=_times(info))

    def _count(self, entries: int) -> None:
        self._entries += entries
        if self._entries > self._limits.max_entries:
            cause = f"the tree has more than {self._limits.max_entries} files"
            raise CopyError(self._operation, cause, "Copy a part of it, or raise max_entries")

    def _spend(self, path: str, size: int) -> None:
        assert self._room is not None, "a copy that runs has its room"
        self._room.take(size)
        self._bytes += size
        if self._bytes > self._limits.max_bytes:
            cause = f"there are more than {self._limits.max_bytes} bytes, as of {path!r}"
            raise CopyError(self._operation, cause, "Copy a part of it, or raise max_bytes")

    def _refusal(
        self, path: str, cause: str, remedy: str = "Remove it, or copy its neighbours"
    ) -> CopyError:
        return CopyError(self._operation, f"{path!r} is not copied: {cause}", remedy)


class CopyIn:
    """One copy from the host to the guest."""

    def __init__(self, files: Files, source: Path, target: str) -> None:
        self._files = files
        self._source = source
        self._target = target
        self._operation = f"copy {source} in to {target}"

    async def run(self) -> None:
        """Copy. Raises CopyError for what is not copied, GuestError, HostError."""
        source = self._source.absolute()
        with _host_errors(self._operation):
            if source.name in ("", ".."):
                source = source.resolve()
            with _opened(source.parent, _DIRECTORY) as parent:
                await self._entry(parent, source.name or ".", self._target, 0)

    async def _entry(self, directory: int, name: str, path: str, depth: int) -> None:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            await self._directory(directory, name, path, depth)
        elif stat.S_ISLNK(mode):
            await self._files.remove(path, missing_ok=True)
            await self._files.symlink(os.readlink(name, dir_fd=directory), path)
        elif stat.S_ISREG(mode):
            await self._file(directory, name, path, depth)
        else:
            raise self._refusal(path, "it is no file, directory or symbolic link")

    async def _directory(self, directory: int, name: str, path: str, depth: int) -> None:
        if depth == MAX_DEPTH:
            raise self._refusal(path, f"it is more than {MAX_DEPTH} directories deep")
        with _opened(name, _DIRECTORY | os.O_NOFOLLOW, directory) as inner:
            await self._make(path, os.fstat(inner).st_mode & _PERMISSIONS, depth)
            for entry in sorted(os.listdir(inner)):  # noqa: PTH208 - of a descriptor
                await self._entry(inner, entry, f"{path.rstrip('/')}/{entry}", depth + 1)

    async def _make(self, path: str, mode: int, depth: int) -> None:
        """Make a guest directory, or find it there; only at the top may a link lead to it."""
        try:
            await self._files.mkdir(path, parents=depth == 0, mode=mode)
        except GuestError as error:
            if error.errno != _EEXIST or not (await self._files.stat(path, follow=False)).is_dir:
                raise

    async def _file(self, directory: int, name: str, path: str, depth: int) -> None:
        with _opened(name, _OLD_FILE, directory) as old:
            status = os.fstat(old)
            if not stat.S_ISREG(status.st_mode):
                raise self._refusal(path, "it was replaced while it was read")
            await self._files.write_stream(
                path,
                _pieces(old),
                mode=status.st_mode & _PERMISSIONS,
                parents=depth == 0,
                mtime_ns=max(status.st_mtime_ns, 0),
            )

    def _refusal(self, path: str, cause: str) -> CopyError:
        return CopyError(self._operation, f"{path!r} is not made: {cause}", "Leave it out")


# Descriptors...


def _is_there(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _host_errors(operation: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename!r})" if error.filename else ""
        cause = f"{error.strerror or error}{where}"
        raise HostError(
            operation, cause, "Look at the host's path, its rights and its disk"
        ) from error


@contextlib.contextmanager
def _opened(path: str | Path, flags: int, directory: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o600, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _staging(parent: int) -> Iterator[int]:
    """A private directory in `parent`, on the same file system, that is gone afterwards."""
    name = f".taskvm-copy-{secrets.token_hex(8)}"
    os.mkdir(name, 0o700, dir_fd=parent)
    try:
        with _opened(name, _DIRECTORY | os.O_NOFOLLOW, parent) as staging:
            yield staging
    finally:
        shutil.rmtree(name, ignore_errors=True, dir_fd=parent)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


async def _pieces(descriptor: int) -> AsyncIterator[bytes]:
    while data := await in_thread(os.read, descriptor, PIECE_BYTES):
        yield data


def _times(info: FileInfo) -> tuple[int, int]:
    mtime_ns = min(max(info.mtime_ns, 0), _MAX_MTIME_NS)
    return (mtime_ns, mtime_ns)
