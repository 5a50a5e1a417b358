"""inotify(7): what happens in directories of the host, as values. Python does not wrap it.

Nothing here blocks. A watch belongs to the inode of a directory and follows it wherever it is moved.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import termios
from contextlib import suppress
from typing import NamedTuple

# linux/inotify.h
MODIFY, ATTRIB, CLOSE_WRITE = 0x2, 0x4, 0x8
MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x40, 0x80, 0x100, 0x200
UNMOUNT, OVERFLOW, IGNORED = 0x2000, 0x4000, 0x8000
IS_DIRECTORY = 0x4000_0000
_ONLY_DIRECTORY, _EXCLUDE_UNLINKED = 0x0100_0000, 0x0400_0000

NAMES = MOVED_FROM | MOVED_TO | CREATE | DELETE
"""Events after which a name may stand for something else."""
# CLOSE_WRITE, because what is written through a mapping causes no MODIFY: the last close comes after the unmapping.
_WATCHED = NAMES | MODIFY | ATTRIB | CLOSE_WRITE | _ONLY_DIRECTORY | _EXCLUDE_UNLINKED

_EVENT = struct.Struct("=iIII")
# A read returns whole events; the longest has a name of 255 bytes and its terminator.
_BUFFER = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


class Event(NamedTuple):
    """Something happened to `name` in the directory that is watched as `wd`, or to the directory itself (no name)."""

    wd: int
    mask: int
    name: bytes


class Inotify:
    """One instance. Raises OSError when this user may have no more of them (fs.inotify.max_user_instances)."""

    def __init__(self) -> None:
        self.fd: int = _check(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))

    def add(self, directory: int) -> int:
        """Watch what the descriptor `directory` refers to (it may be O_PATH). ENOSPC: no more watches."""
        path = b"/proc/self/fd/%d" % directory
        watched = ctypes.c_uint32(_WATCHED)
        return _check(
            _libc.inotify_add_watch(ctypes.c_int(self.fd), ctypes.c_char_p(path), watched)
        )

    def remove(self, wd: int) -> None:
        """Watch no longer; IGNORED follows. A watch that is gone already is no error."""
        _libc.inotify_rm_watch(ctypes.c_int(self.fd), ctypes.c_int(wd))

    def read(self) -> list[Event]:
        """Return what has happened, in order; empty when nothing more has."""
        with suppress(BlockingIOError):
            return parse(os.read(self.fd, _BUFFER))
        return []

    def poke(self) -> None:
        """Make the descriptor readable, for one event of nothing: that a watch was removed. Raises OSError."""
        # Of no directory that can be served: only what is on a disk is watched.
        watch = ctypes.c_char_p(b"/proc/self/fdinfo")
        self.remove(
            _check(_libc.inotify_add_watch(ctypes.c_int(self.fd), watch, ctypes.c_uint32(DELETE)))
        )

    def pending(self) -> bool:
        """Tell whether there is more to read."""
        waiting = fcntl.ioctl(self.fd, termios.FIONREAD, b"\0\0\0\0")
        return any(waiting)

    def close(self) -> None:
        """End all watches."""
        os.close(self.fd)


def parse(data: bytes) -> list[Event]:
    """Return the events in `data`, as read(2) returned them."""
    events = []
    position = 0
    while position < len(data):
        wd, mask, _cookie, length = _EVENT.unpack_from(data, position)
        position += _EVENT.size
        events.append(Event(wd, mask, data[position : position + length].rstrip(b"\0")))
        position += length
    return events


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
