"""What a kernel asks of a FUSE mount: requests, decoded from bytes. Replies are in fuse_replies.py.

The format is linux/fuse.h, protocol 7.31 to 7.38, little-endian: a 40-byte header and a body that the opcode
defines. What only exists when a capability was negotiated that we never offer (locks, DAX, security contexts)
is not decoded. About half of the lines are tables.

Rule 1: every length is checked; whatever bytes come, the only exception is FuseError.
Rule 2: a name that was decoded is one path component: not empty, not `.` or `..`, no slash, no NUL.
Rule 3: payloads are views into the message; only names are copied.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable

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


_HEADER = struct.Struct("<IIQQIIIHH")


def decode_request(message: memoryview) -> Request:
    """Return the request that `message`, exactly one message, holds. Raises FuseError."""
    total = len(message)
    if total < REQUEST_HEADER_SIZE:
        raise FuseError(f"a message of {total} bytes is shorter than its header")
    length, opcode, unique, node, uid, gid, _pid, extensions, _ = _HEADER.unpack_from(message)
    if length != total:
        raise FuseError(f"a message of {total} bytes says it has {length}")
    if extensions:
        raise FuseError("a request carries extensions, which were not negotiated")
    decode = _BODIES.get(opcode)
    arguments = decode(message[REQUEST_HEADER_SIZE:], node) if decode is not None else None
    return Request(opcode, unique, node, uid, gid, arguments)


def _fixed(layout: struct.Struct, body: memoryview, what: str) -> tuple[int, ...]:
    if len(body) != layout.size:
        raise FuseError(f"{what} has a body of {len(body)} bytes, not {layout.size}")
    return layout.unpack(body)


def _head(layout: struct.Struct, body: memoryview, what: str) -> tuple[tuple[int, ...], memoryview]:
    if len(body) < layout.size:
        raise FuseError(f"{what} has a body of {len(body)} bytes, less than {layout.size}")
    return layout.unpack_from(body), body[layout.size :]


def _component(text: bytes) -> bytes:
    if not text or text == b"." or text == b".." or b"/" in text or b"\0" in text:
        raise FuseError("a name is not one path component")
    if len(text) > MAX_NAME:
        raise FuseError(f"a name has {len(text)} bytes, more than {MAX_NAME}")
    return text


def _terminated(body: memoryview) -> bytes:
    text = bytes(body)
    if not text.endswith(b"\0"):
        raise FuseError("a name is not terminated")
    return text[:-1]


def _name(body: memoryview) -> bytes:
    return _component(_terminated(body))


def _two_strings(body: memoryview) -> tuple[bytes, bytes]:
    first, separator, second = _terminated(body).partition(b"\0")
    if not separator or b"\0" in second:
        raise FuseError("two names were expected")
    return first, second


def _attribute_name(text: bytes) -> bytes:
    # xattr(7): a name is at most 255 bytes; it may hold slashes.
    if not text or b"\0" in text or len(text) > 255:
        raise FuseError("an extended attribute has no proper name")
    return text


_INIT = struct.Struct("<IIII")
_FORGET = struct.Struct("<Q")
_BATCH_FORGET = struct.Struct("<II")
_FORGET_ONE = struct.Struct("<QQ")
_GETATTR = struct.Struct("<IIQ")
_SETATTR = struct.Struct("<IIQQQqqqIIIIIIII")
_MKNOD = struct.Struct("<IIII")
_MKDIR = struct.Struct("<II")
_CREATE = struct.Struct("<IIII")
_RENAME = struct.Struct("<Q")
_RENAME2 = struct.Struct("<QII")
_LINK = struct.Struct("<Q")
_READ = struct.Struct("<QQIIQII")
_WRITE = struct.Struct("<QQIIQII")
_FSYNC = struct.Struct("<QII")
_SETXATTR = struct.Struct("<II")
_GETXATTR = struct.Struct("<II")
_FALLOCATE = struct.Struct("<QQQII")
_LSEEK = struct.Struct("<QQII")
_COPY_FILE_RANGE = struct.Struct("<QQQQQQQ")

_NS = 1_000_000_000
_MAX_OFFSET = 2**63 - 1  # loff_t


def _offset(value: int) -> int:
    if value > _MAX_OFFSET:
        raise FuseError("an offset is negative")
    return value


def _decode_init(body: memoryview, _node: int) -> Init:
    # Longer since 7.36 (flags2), and free to grow: only the first 16 bytes are needed.
    fields, _rest = _head(_INIT, body, "INIT")
    return Init(*fields)


def _decode_name(body: memoryview, _node: int) -> Name:
    return Name(_name(body))


def _decode_forget(body: memoryview, node: int) -> Forget:
    (count,) = _fixed(_FORGET, body, "FORGET")
    return Forget(((node, count),))


def _decode_batch_forget(body: memoryview, _node: int) -> Forget:
    (count, _), rest = _head(_BATCH_FORGET, body, "BATCH_FORGET")
    if len(rest) != count * _FORGET_ONE.size:
        raise FuseError(f"BATCH_FORGET of {count} nodes has {len(rest)} bytes of them")
    return Forget(tuple(_FORGET_ONE.iter_unpack(rest)))


def _decode_getattr(body: memoryview, _node: int) -> None:
    _fixed(_GETATTR, body, "GETATTR")


def _decode_setattr(body: memoryview, _node: int) -> SetAttr:
    (
        valid,
        _,
        _fh,
        size,
        _owner,
        atime,
        mtime,
        _ctime,
        atime_ns,
        mtime_ns,
        _,
        mode,
        _,
        uid,
        gid,
        _,
    ) = _fixed(_SETATTR, body, "SETATTR")
    if atime_ns >= _NS or mtime_ns >= _NS:
        raise FuseError("SETATTR has a time with more than a second of nanoseconds")
    if valid & SetAttrField.SIZE:
        _offset(size)
    return SetAttr(valid, size, atime * _NS + atime_ns, mtime * _NS + mtime_ns, mode, uid, gid)


def _decode_symlink(body: memoryview, _node: int) -> Symlink:
    name, target = _two_strings(body)
    if not target:
        raise FuseError("a symbolic link has no target")
    return Symlink(_component(name), target)


def _decode_mknod(body: memoryview, _node: int) -> MakeNode:
    (mode, _rdev, _umask, _), rest = _head(_MKNOD, body, "MKNOD")
    return MakeNode(_name(rest), mode)


def _decode_mkdir(body: memoryview, _node: int) -> MakeNode:
    (mode, _umask), rest = _head(_MKDIR, body, "MKDIR")
    return MakeNode(_name(rest), mode)


def _decode_create(body: memoryview, _node: int) -> MakeNode:
    (flags, mode, _umask, _), rest = _head(_CREATE, body, "CREATE")
    return MakeNode(_name(rest), mode, flags)


def _decode_rename(body: memoryview, _node: int) -> Rename:
    (new_parent,), rest = _head(_RENAME, body, "RENAME")
    name, new_name = _two_strings(rest)
    return Rename(new_parent, 0, _component(name), _component(new_name))


def _decode_rename2(body: memoryview, _node: int) -> Rename:
    (new_parent, flags, _), rest = _head(_RENAME2, body, "RENAME2")
    name, new_name = _two_strings(rest)
    return Rename(new_parent, flags, _component(name), _component(new_name))


def _decode_link(body: memoryview, _node: int) -> Link:
    (target,), rest = _head(_LINK, body, "LINK")
    return Link(target, _name(rest))


def _decode_read(body: memoryview, _node: int) -> Read:
    _fh, offset, size, _, _owner, _flags, _ = _fixed(_READ, body, "READ")
    if size > MAX_WRITE:
        raise FuseError(f"a read of {size} bytes is longer than {MAX_WRITE}")
    # Not _offset(): the cookies of READDIR are any 64 bits.
    return Read(offset, size)


def _decode_file_read(body: memoryview, node: int) -> Read:
    read = _decode_read(body, node)
    _offset(read.offset)
    return read


def _decode_write(body: memoryview, _node: int) -> Write:
    (_fh, offset, size, write_flags, _owner, flags, _), data = _head(_WRITE, body, "WRITE")
    if size != len(data) or size > MAX_WRITE:
        raise FuseError(f"WRITE of {size} bytes carries {len(data)}; at most {MAX_WRITE} may be")
    return Write(_offset(offset), data, write_flags, flags)


def _decode_fsync(body: memoryview, _node: int) -> Sync:
    _fh, flags, _ = _fixed(_FSYNC, body, "FSYNC")
    return Sync(bool(flags & 1))


def _decode_setxattr(body: memoryview, _node: int) -> SetXattr:
    (size, flags), rest = _head(_SETXATTR, body, "SETXATTR")
    if len(rest) < size:
        raise FuseError(f"SETXATTR of {size} bytes carries only {len(rest)} with the name")
    name = _terminated(rest[: len(rest) - size])
    return SetXattr(_attribute_name(name), bytes(rest[len(rest) - size :]), flags)


def _decode_getxattr(body: memoryview, _node: int) -> GetXattr:
    (size, _), rest = _head(_GETXATTR, body, "GETXATTR")
    return GetXattr(_attribute_name(_terminated(rest)), size)


def _decode_listxattr(body: memoryview, _node: int) -> GetXattr:
    size, _ = _fixed(_GETXATTR, body, "LISTXATTR")
    return GetXattr(b"", size)


def _decode_removexattr(body: memoryview, _node: int) -> Name:
    return Name(_attribute_name(_terminated(body)))


def _decode_fallocate(body: memoryview, _node: int) -> Allocate:
    _fh, offset, length, mode, _ = _fixed(_FALLOCATE, body, "FALLOCATE")
    return Allocate(_offset(offset), _offset(length), mode)


def _decode_lseek(body: memoryview, _node: int) -> Seek:
    _fh, offset, whence, _ = _fixed(_LSEEK, body, "LSEEK")
    return Seek(_offset(offset), whence)


def _decode_copy_file_range(body: memoryview, _node: int) -> CopyRange:
    _fh, offset, target, _fh_out, target_offset, length, flags = _fixed(
        _COPY_FILE_RANGE, body, "COPY_FILE_RANGE"
    )
    if flags:
        raise FuseError("COPY_FILE_RANGE has flags, and none are defined")
    return CopyRange(_offset(offset), target, _offset(target_offset), length)


_BODIES: dict[int, Callable[[memoryview, int], object]] = {
    Opcode.LOOKUP: _decode_name,
    Opcode.FORGET: _decode_forget,
    Opcode.GETATTR: _decode_getattr,
    Opcode.SETATTR: _decode_setattr,
    Opcode.SYMLINK: _decode_symlink,
    Opcode.MKNOD: _decode_mknod,
    Opcode.MKDIR: _decode_mkdir,
    Opcode.UNLINK: _decode_name,
    Opcode.RMDIR: _decode_name,
    Opcode.RENAME: _decode_rename,
    Opcode.LINK: _decode_link,
    Opcode.READ: _decode_file_read,
    Opcode.WRITE: _decode_write,
    Opcode.FSYNC: _decode_fsync,
    Opcode.SETXATTR: _decode_setxattr,
    Opcode.GETXATTR: _decode_getxattr,
    Opcode.LISTXATTR: _decode_listxattr,
    Opcode.REMOVEXATTR: _decode_removexattr,
    Opcode.INIT: _decode_init,
    Opcode.READDIR: _decode_read,
    Opcode.FSYNCDIR: _decode_fsync,
    Opcode.CREATE: _decode_create,
    Opcode.BATCH_FORGET: _decode_batch_forget,
    Opcode.FALLOCATE: _decode_fallocate,
    Opcode.READDIRPLUS: _decode_read,
    Opcode.RENAME2: _decode_rename2,
    Opcode.LSEEK: _decode_lseek,
    Opcode.COPY_FILE_RANGE: _decode_copy_file_range,
}
