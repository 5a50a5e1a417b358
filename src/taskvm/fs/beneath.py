"""What openat2(2) does, for hosts where a filter of system calls (an older container's) or the kernel refuses it.

As strict, and slower: every component is opened as itself (O_PATH, O_NOFOLLOW), which does nothing to what it is,
and looked at before the next one; only then is the last one opened, through its own descriptor. No name is used twice.
"""

from __future__ import annotations

import errno
import os
import stat

_ITSELF = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def open_beneath(directory: int, path: bytes, flags: int) -> int:
    """Open what exists at `path` beneath `directory`: no `..`, no link followed, no mount point entered."""
    if path.startswith(b"/"):
        raise _error(errno.EXDEV)
    mount = _mount_of(directory)
    handle = os.dup(directory)
    try:
        for component in path.split(b"/"):
            if component in (b"", b"."):
                continue
            _refuse_link(handle)
            following = _step(handle, component, mount)
            os.close(handle)
            handle = following
        return _opened(handle, flags)
    finally:
        os.close(handle)


def _step(directory: int, component: bytes, mount: bytes) -> int:
    if component == b"..":
        raise _error(errno.EXDEV)
    handle = os.open(component, _ITSELF, dir_fd=directory)
    if _mount_of(handle) != mount:
        os.close(handle)
        raise _error(errno.EXDEV)
    return handle


def _opened(handle: int, flags: int) -> int:
    """Return a descriptor of what `handle` is, as `flags` ask for it."""
    mode = os.fstat(handle).st_mode
    if not flags & os.O_PATH or not flags & os.O_NOFOLLOW:
        _refuse_link(handle)
    if flags & os.O_DIRECTORY and not stat.S_ISDIR(mode):
        raise _error(errno.ENOTDIR)
    if flags & os.O_PATH:
        return os.dup(handle)
    again = (flags | os.O_CLOEXEC) & ~os.O_NOFOLLOW  # what leads there is a link of /proc
    return os.open(f"/proc/self/fd/{handle}", again)


def _refuse_link(handle: int) -> None:
    if stat.S_ISLNK(os.fstat(handle).st_mode):
        raise _error(errno.ELOOP)


def _mount_of(handle: int) -> bytes:
    # The device is not enough: a bind mount has that of its source.
    with open(f"/proc/self/fdinfo/{handle}", "rb") as info:
        for line in info:
            if line.startswith(b"mnt_id:"):
                return line
    raise _error(errno.EXDEV)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
