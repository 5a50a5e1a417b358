"""Where taskvm keeps things on the host, private to the user, how a small file is replaced in one step, and how a
directory is kept from being removed while it is used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from taskvm.errors import HostError

# How often a directory may be removed between its making and its holding.
_ATTEMPTS = 8


def cache_dir() -> Path:
    """Return the directory of images, templates and running sandboxes (made 0700).

    `TASKVM_CACHE`, else `$XDG_CACHE_HOME/taskvm`, else `~/.cache/taskvm`.
    """
    return private_dir(cache_path())


def cache_path() -> Path:
    """Return the same directory without making it."""
    if chosen := os.environ.get("TASKVM_CACHE"):
        return Path(chosen).absolute()
    return _xdg("XDG_CACHE_HOME", Path.home() / ".cache") / "taskvm"


def state_dir() -> Path:
    """Return the directory of what outlives a sandbox, such as audit logs: `$XDG_STATE_HOME/taskvm` (made 0700)."""
    return private_dir(state_path())


def state_path() -> Path:
    """Return the same directory without making it."""
    return _xdg("XDG_STATE_HOME", Path.home() / ".local" / "state") / "taskvm"


def private_dir(path: Path) -> Path:
    """Make `path` and its parents, readable by this user alone.

    Raises HostError when that fails, or when another user owns what is there or may write to it: images and saved
    machines are believed because they lie in it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise HostError(
            f"make the directory {path}", error.strerror or str(error), remedy_for(error)
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise HostError(
            f"use the directory {path}",
            f"another user owns it or may write to it (owner {status.st_uid}, "
            f"mode {stat.S_IMODE(status.st_mode):o})",
            "chmod it to 700, or choose a directory of your own (TASKVM_CACHE, XDG_STATE_HOME)",
        )
    return path.absolute()


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step: a reader sees the old file or the new one, never a part.

    Content and name are on the disk when this returns. Raises HostError when the disk is full or the directory
    cannot be written.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)  # noqa: PTH105 - a name from mkstemp is a str
            sync_directory(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise HostError(f"write {path}", error.strerror or str(error), remedy_for(error)) from error


def sync_directory(path: Path) -> None:
    """Write the names in a directory through to the disk (fsync(2): a file's own fsync does not)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hold(path: Path) -> int:
    """Return a descriptor that keeps the directory `path` in use until it is closed or this process ends.

    Raises HostError when it is gone.
    """
    operation, remedy = f"use {path}", "Start again: what is missing is made anew"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(operation, error.strerror or str(error), remedy) from error
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # whoever removes it has it for one rename
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
    os.close(descriptor)
    raise HostError(operation, "it was removed a moment ago", remedy)


def hold_new(make: Callable[[], Path]) -> tuple[Path, int]:
    """Return the directory that `make` makes, and `hold` of it.

    It is made again when another process has just found that nobody holds it. Raises as both.
    """
    for _ in range(_ATTEMPTS - 1):
        path = make()
        with contextlib.suppress(HostError):
            return path, hold(path)
    path = make()
    return path, hold(path)


@contextlib.contextmanager
def seized(path: Path) -> Iterator[bool]:
    """Say whether nobody holds the directory `path`. If so, nobody can until the end, when it should be gone.

    Raises FileNotFoundError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with lock_if_free(descriptor) as free:
        # Between the two another may have been put in its place, which somebody may hold.
        yield free and os.path.samestat(path.stat(), os.fstat(descriptor))


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Return them by the time of their last change, without those that somebody has removed meanwhile."""
    times: dict[Path, int] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime_ns
    return sorted(times, key=times.__getitem__, reverse=True)


@contextlib.contextmanager
def lock_if_free(descriptor: int) -> Iterator[bool]:
    """Take the lock of an open file alone, without waiting; say whether it was free. Closes the file at the end."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Removed:
    """Something that is gone from the cache: what, and the bytes of disk that it took."""

    what: str
    size_bytes: int


def measure(path: Path) -> int:
    """Return the bytes that a file or a tree takes on the disk, which for a sparse file is less than its size.

    What another process removes meanwhile takes none.
    """
    size = 0
    for file in _all_of(path):
        with contextlib.suppress(FileNotFoundError):
            size += os.lstat(file).st_blocks * 512
    return size


def _all_of(path: Path) -> Iterator[Path]:
    yield path
    for top, directories, files in os.walk(path):
        yield from (Path(top, name) for name in (*directories, *files))


def remedy_for(error: OSError) -> str:
    """Return what to do when the cache cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free disk space, or set TASKVM_CACHE to a directory on a larger disk"
    return "Set TASKVM_CACHE to a directory that you may write to"


def _xdg(variable: str, default: Path) -> Path:
    chosen = Path(os.environ.get(variable, ""))
    # The XDG Base Directory specification: a relative path is to be ignored.
    return chosen if chosen.is_absolute() else default
