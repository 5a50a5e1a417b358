"""The Linux system calls that the workspace needs and Python does not wrap.

Called by number, because the C library has no wrapper for openat2 and older ones lack others. Only x86-64 and
aarch64, which are the hosts there are. Every function raises OSError with the errno, as `os` does.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct

import msgspec

from taskvm.errors import UnavailableError
from taskvm.fs import beneath

# asm/unistd_64.h and asm-generic/unistd.h; openat2 is newer than the split and has one number everywhere.
_NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {"getdents64": 217, "utimensat": 280, "fallocate": 285, "renameat2": 316},
    "aarch64": {"getdents64": 61, "utimensat": 88, "fallocate": 47, "renameat2": 276},
}
_OPENAT2 = 437

# linux/openat2.h
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE = _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH

_AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT, _AT_EMPTY_PATH = 0x100, 0x800, 0x1000
_NS = 1_000_000_000
NOW = (0, (1 << 30) - 1)  # UTIME_NOW
OMIT = (0, (1 << 30) - 2)  # UTIME_OMIT
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

_OPEN_HOW = struct.Struct("QQQ")
_TIMES = struct.Struct("qqqq")
_DIRENT = struct.Struct("=QQHB")
_DIRENT_NAME = _DIRENT.size  # struct linux_dirent64 has no padding before d_name

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _number(name: str) -> ctypes.c_long:
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        raise UnavailableError(
            f"call {name}",
            f"its number on {platform.machine()} is not known",
            "Use x86-64 or arm64",
        )
    return ctypes.c_long(numbers[name])


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class HostAttr(msgspec.Struct, frozen=True, gc=False):
    """What statx(2) tells; the names are those of os.stat_result, which lacks the time of birth."""

    st_mode: int
    st_ino: int
    st_dev: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_size: int
    st_blocks: int
    st_blksize: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_birth_ns: int

    def without_birth(self) -> HostAttr:
        """Return the same of a file whose time of birth cannot be relied on."""
        return msgspec.structs.replace(self, st_birth_ns=0)


# struct statx of linux/stat.h, up to stx_dev_minor, and the bits of its mask.
_STATX = struct.Struct("=II8xIIIHxxQQQ8x" + "qI4x" * 4 + "8xII")
_StatxBuffer = ctypes.c_char * 256
_STATX_BASIC_AND_BIRTH = 0x7FF + 0x800
_STATX_BIRTH = 0x800
# A look at a name must not make the host mount what is not mounted yet.
_STATX_FLAGS = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_EMPTY_PATH
_libc.statx.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    _StatxBuffer,
)


def stat_at(directory: int, name: bytes) -> HostAttr:
    """Return the attributes of `name`, which is not followed; with an empty one those of `directory` itself."""
    buffer = _StatxBuffer()
    _check(_libc.statx(directory, name, _STATX_FLAGS, _STATX_BASIC_AND_BIRTH, buffer))
    mask, blksize, nlink, uid, gid, mode, ino, size, blocks, *rest = _STATX.unpack_from(buffer)
    atime, atime_ns, birth, birth_ns, ctime, ctime_ns, mtime, mtime_ns, major, minor = rest
    return HostAttr(
        mode,
        ino,
        os.makedev(major, minor),
        nlink,
        uid,
        gid,
        size,
        blocks,
        blksize,
        atime * _NS + atime_ns,
        mtime * _NS + mtime_ns,
        ctime * _NS + ctime_ns,
        birth * _NS + birth_ns if mask & _STATX_BIRTH else 0,
    )


def stat_fd(fd: int) -> HostAttr:
    """Return the attributes of what `fd` refers to, an O_PATH descriptor too."""
    return stat_at(fd, b"")


def filesystem_type(fd: int) -> int:
    """Return the magic number of the file system that `fd` is on (statfs(2))."""
    buffer = ctypes.create_string_buffer(256)
    _check(_libc.fstatfs(ctypes.c_int(fd), buffer))
    return int(ctypes.c_ulong.from_buffer(buffer).value)


_OPENAT2_NUMBER = ctypes.c_long(_OPENAT2)
_OPEN_HOW_SIZE = ctypes.c_size_t(_OPEN_HOW.size)


@functools.cache
def has_openat2() -> bool:
    """Tell whether this host lets openat2(2) through. Without arguments it is ENOSYS or EPERM only where not."""
    result = _syscall(_OPENAT2_NUMBER, ctypes.c_int(-1), None, None, ctypes.c_size_t(0))
    return result >= 0 or ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM)


def open_beneath(directory: int, path: bytes, flags: int) -> int:
    """Open what exists at `path` beneath the descriptor `directory`, and nothing else.

    No symbolic link is followed, none of /proc's either, and no mount point entered, at any component. With O_PATH
    and O_NOFOLLOW the last component may be a symbolic link: it is opened itself.
    """
    if not has_openat2():
        return beneath.open_beneath(directory, path, flags)
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, 0, _RESOLVE)
    return _check(
        _syscall(
            _OPENAT2_NUMBER,
            ctypes.c_int(directory),
            ctypes.c_char_p(path),
            ctypes.c_char_p(how),
            _OPEN_HOW_SIZE,
        )
    )


def rename(directory: int, name: bytes, new_directory: int, new_name: bytes, flags: int) -> None:
    """Call renameat2(2)."""
    _check(
        _syscall(
            _number("renameat2"),
            ctypes.c_int(directory),
            ctypes.c_char_p(name),
            ctypes.c_int(new_directory),
            ctypes.c_char_p(new_name),
            ctypes.c_uint(flags),
        )
    )


def allocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2), which Python wraps without its mode."""
    _check(
        _syscall(
            _number("fallocate"),
            ctypes.c_int(fd),
            ctypes.c_int(mode),
            ctypes.c_long(offset),
            ctypes.c_long(length),
        )
    )


def set_times(fd: int, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set the times (seconds, ns), NOW or OMIT of what `fd` refers to, an O_PATH descriptor too."""
    _check(
        _syscall(
            _number("utimensat"),
            ctypes.c_int(fd),
            ctypes.c_char_p(b""),
            ctypes.c_char_p(_TIMES.pack(*atime, *mtime)),
            ctypes.c_int(_AT_EMPTY_PATH),
        )
    )


def read_directory(fd: int, size: int) -> list[tuple[bytes, int, int, int]]:
    """Return (name, inode, DT_ type, offset after it) of about `size` bytes of entries. Empty at the end."""
    buffer = ctypes.create_string_buffer(size)
    number = _number("getdents64")
    count = _check(_syscall(number, ctypes.c_int(fd), buffer, ctypes.c_size_t(size)))
    data = buffer.raw[:count]
    entries = []
    position = 0
    while position < count:
        ino, following, length, kind = _DIRENT.unpack_from(data, position)
        start = position + _DIRENT_NAME
        entries.append((data[start : data.index(0, start)], ino, kind, following))
        position += length
    return entries
