"""A directory of the host, looked at and changed by paths beneath it that come from a guest.

Rule 1: every path is walked by openat2 from the root's descriptor, beneath it, across no symbolic link and no mount
    point; a change names one component in a directory that was reached so.
Rule 2: nothing but files, directories and symbolic links is made, and never with a set-id bit.
Rule 3: a file or link appears whole, by a rename, and only where there is still what the caller saw (`Seen`).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO, Self

from taskvm.fs import syscalls

PERMISSIONS = 0o777
_COPY_BYTES = 1024 * 1024
_ITSELF = os.O_PATH | os.O_NOFOLLOW
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO put in a file's place must not hold the opening up.
_OLD_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
# Nothing there, or no way there: something on it is no directory, a link, or another file system.
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENAMETOOLONG)


@dataclass(frozen=True, slots=True)
class Seen:
    """What was at a path of the host. `ctime_ns` moves with every change of it, and no program can set it."""

    mode: int
    size: int
    inode: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        return cls(status.st_mode, status.st_size, status.st_ino, status.st_ctime_ns)

    @property
    def kind(self) -> int:
        """The type, as stat.S_IFMT returns it."""
        return stat.S_IFMT(self.mode)

    @property
    def permissions(self) -> int:
        return self.mode & PERMISSIONS


class ChangedError(Exception):
    """Raised when the host has something else at a path than the caller saw there."""


class HostPaths:
    """The tree below `root`, an open descriptor of a directory that this takes over. Paths are relative to it."""

    def __init__(self, root: int) -> None:
        self._root = root

    def close(self) -> None:
        """Close the root. Idempotent."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    # Looking.

    def see(self, path: str) -> Seen | None:
        """Return what is at `path` itself, None for nothing (or nothing that can be reached beneath the root)."""
        try:
            with self._opened(path, _ITSELF) as fd:
                return Seen.of(os.fstat(fd))
        except OSError as error:
            if error.errno in _NOWHERE:
                return None
            raise

    def names(self, path: str) -> list[str]:
        """Return the names in the directory `path`, sorted."""
        with self._opened(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) as fd:
            return sorted(os.listdir(fd))  # noqa: PTH208 - of a descriptor

    def target(self, path: str) -> str:
        """Return what the symbolic link `path` holds."""
        with self._opened(path, _ITSELF) as fd:
            return os.readlink("", dir_fd=fd)

    @contextmanager
    def reading(self, path: str) -> Iterator[BinaryIO]:
        """Open the regular file `path`. Raises OSError for anything else there."""
        with self._opened(path, _OLD_FILE) as fd:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            with open(fd, "rb", closefd=False) as file:
                yield file

    # Changing.

    def write(self, path: str, content: BinaryIO, mode: int, seen: Seen | None) -> Seen:
        """Put a file with `content` at `path` where `seen` is now. Not synced to the disk, as no checkout of git's is:
        5 ms each, where a tree has thousands.
        """
        with self._parent(path) as (parent, name), _temporary(parent) as temporary:
            fd = os.open(temporary, _NEW_FILE, 0o600, dir_fd=parent)
            try:
                while piece := content.read(_COPY_BYTES):
                    _write_all(fd, piece)
                os.fchmod(fd, mode & PERMISSIONS)
            finally:
                os.close(fd)
            return _put(parent, temporary, name, seen)

    def link(self, path: str, target: str, seen: Seen | None) -> Seen:
        """Put a symbolic link at `path` where `seen` is now."""
        with self._parent(path) as (parent, name), _temporary(parent) as temporary:
            os.symlink(target, temporary, dir_fd=parent)
            return _put(parent, temporary, name, seen)

    def mkdir(self, path: str, mode: int) -> Seen:
        """Make a directory; its owner can always look into it."""
        with self._parent(path) as (parent, name):
            os.mkdir(name, 0o700, dir_fd=parent)
        return self.chmod(path, mode | stat.S_IRWXU, None)

    def chmod(self, path: str, mode: int, seen: Seen | None) -> Seen:
        """Set the permissions of the file or directory at `path`, when that is still `seen` (None: whatever it is)."""
        with self._opened(path, _ITSELF) as fd:
            now = Seen.of(os.fstat(fd))
            if seen is not None and now != seen:
                raise ChangedError
            if now.kind not in (stat.S_IFREG, stat.S_IFDIR):
                raise OSError(errno.EINVAL, "neither file nor directory")
            os.chmod(f"/proc/self/fd/{fd}", mode & PERMISSIONS)  # noqa: PTH101 - fchmod refuses O_PATH
            return Seen.of(os.fstat(fd))

    def remove(self, path: str, seen: Seen) -> None:
        """Remove the file or the empty directory at `path`, when that is still what was seen."""
        with self._parent(path) as (parent, name):
            now = _see(parent, name)
            if now is None:
                return
            if seen.kind == stat.S_IFDIR and now.kind == stat.S_IFDIR:
                os.rmdir(
                    name, dir_fd=parent
                )  # it changed with what was in it; rmdir removes nothing but itself
            elif now != seen:
                raise ChangedError
            else:
                os.unlink(name, dir_fd=parent)

    @contextmanager
    def _opened(self, path: str, flags: int) -> Iterator[int]:
        fd = syscalls.open_beneath(self._root, os.fsencode(path) or b".", flags)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        above, _, name = path.rpartition("/")
        with self._opened(above, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW) as parent:
            yield parent, name


def _see(parent: int, name: str) -> Seen | None:
    try:
        return Seen.of(os.stat(name, dir_fd=parent, follow_symlinks=False))
    except FileNotFoundError:
        return None


@contextmanager
def _temporary(parent: int) -> Iterator[str]:
    name = f".taskvm-apply-{secrets.token_hex(8)}"
    try:
        yield name
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)


def _put(parent: int, temporary: str, name: str, seen: Seen | None) -> Seen:
    """Rename `temporary` to `name`. Between the look and the rename over it a host program's save could be lost:
    microseconds, which rename(2) has no way to close.
    """
    if _see(parent, name) != seen:
        raise ChangedError
    source, target = os.fsencode(temporary), os.fsencode(name)
    try:
        syscalls.rename(
            parent, source, parent, target, 0 if seen is not None else syscalls.RENAME_NOREPLACE
        )
    except FileExistsError:
        raise ChangedError from None
    return Seen.of(os.stat(name, dir_fd=parent, follow_symlinks=False))


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
