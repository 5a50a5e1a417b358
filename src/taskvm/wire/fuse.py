"""What a kernel asks of a FUSE mount: the numbers of linux/fuse.h, and a value for each kind of request.

Protocol 7.31 to 7.38. What only exists when a capability was negotiated that we never offer (locks, DAX, security
contexts) has no value. The bytes of requests are read in fuse_requests.py, those of replies made in fuse_replies.py.
"""

from __future__ import annotations

import enum

import msgspec

KERNEL_MAJOR = 7
KERNEL_MINOR = (
    38  # the newest layout known here; a newer kernel is answered with this one and speaks it
)
OLDEST_MINOR = 31  # Linux 5.4
MAX_NAME = 4095  # the kernel's own limit was 1024 and is PATH_MAX - 1 since 6.14; the file system has its own, smaller
MAX_WRITE = 1024 * 1024  # max_pages is 256: the most that fs/fuse allows (FUSE_MAX_MAX_PAGES)
MAX_PAGES = 256
REQUEST_HEADER_SIZE = 40
ROOT = 1  # FUSE_ROOT_ID


class Opcode(enum.IntEnum):
    """enum fuse_opcode, as far as a mount without locks and DAX sends it."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47


class InitFlag(enum.IntFlag):
    """Capabilities of INIT that this package offers or names."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    HANDLE_KILLPRIV_V2 = 1 << 28


class SetAttrField(enum.IntFlag):
    """Which fields of SETATTR count (FATTR_*)."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    KILL_SUIDGID = 1 << 11


WRITE_CACHE = (
    1 << 0
)  # the page cache writes back a mapping: not the write of a program, so never an append


class FuseError(Exception):
    """Raised when a message is not one that a kernel could have sent. The mount cannot be served on."""


# Requests.


class Request(msgspec.Struct, frozen=True, gc=False):
    """One request. `arguments` is the struct of its opcode below, or None where the body is empty or not ours."""

    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    arguments: object


class Init(msgspec.Struct, frozen=True, gc=False):
    """INIT: the kernel's version and its capabilities."""

    major: int
    minor: int
    max_readahead: int
    flags: int


class Name(msgspec.Struct, frozen=True, gc=False):
    """LOOKUP, UNLINK, RMDIR: an entry of the directory `request.node`. REMOVEXATTR: an attribute's name."""

    name: bytes


class Forget(msgspec.Struct, frozen=True, gc=False):
    """FORGET and BATCH_FORGET: (node, references dropped)."""

    nodes: tuple[tuple[int, int], ...]


class SetAttr(msgspec.Struct, frozen=True, gc=False):
    """SETATTR. Only what `valid` names counts; times in ns since the epoch."""

    valid: int
    size: int
    atime_ns: int
    mtime_ns: int
    mode: int
    uid: int
    gid: int


class Symlink(msgspec.Struct, frozen=True, gc=False):
    """SYMLINK `name` -> `target`."""

    name: bytes
    target: bytes


class MakeNode(msgspec.Struct, frozen=True, gc=False):
    """MKNOD, MKDIR and CREATE. The kernel has applied the umask; `flags` are open(2)'s (CREATE only)."""

    name: bytes
    mode: int
    flags: int = 0


class Rename(msgspec.Struct, frozen=True, gc=False):
    """RENAME and RENAME2: from `request.node`/`name` to `new_parent`/`new_name`, flags of renameat2(2)."""

    new_parent: int
    flags: int
    name: bytes
    new_name: bytes


class Link(msgspec.Struct, frozen=True, gc=False):
    """LINK: a further name, in the directory `request.node`, of `target`."""

    target: int
    name: bytes


class Read(msgspec.Struct, frozen=True, gc=False):
    """READ, READDIR and READDIRPLUS."""

    offset: int
    size: int


class Write(msgspec.Struct, frozen=True, gc=False):
    """WRITE. `flags` are those of the open file, `write_flags` WRITE_*."""

    offset: int
    data: memoryview
    write_flags: int
    flags: int


class Sync(msgspec.Struct, frozen=True, gc=False):
    """FSYNC and FSYNCDIR."""

    data_only: bool


class SetXattr(msgspec.Struct, frozen=True, gc=False):
    """SETXATTR, flags of setxattr(2)."""

    name: bytes
    value: bytes
    flags: int


class GetXattr(msgspec.Struct, frozen=True, gc=False):
    """GETXATTR and LISTXATTR (whose name is empty). `size` 0 asks for the length only."""

    name: bytes
    size: int


class Allocate(msgspec.Struct, frozen=True, gc=False):
    """FALLOCATE, mode of fallocate(2)."""

    offset: int
    length: int
    mode: int


class Seek(msgspec.Struct, frozen=True, gc=False):
    """LSEEK: only SEEK_DATA and SEEK_HOLE are sent."""

    offset: int
    whence: int


class CopyRange(msgspec.Struct, frozen=True, gc=False):
    """COPY_FILE_RANGE from `request.node`."""

    offset: int
    target: int
    target_offset: int
    length: int
