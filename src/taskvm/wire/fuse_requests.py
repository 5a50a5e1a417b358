"""The requests of a kernel to a FUSE mount, decoded from bytes: a 40-byte header and a body that the opcode defines.

The format is linux/fuse.h, little-endian; the values are in fuse.py. About half of the lines are tables.

Rule 1: every length is checked; whatever bytes come, the only exception is FuseError.
Rule 2: a name that was decoded is one path component: not empty, not `.` or `..`, no slash, no NUL.
Rule 3: payloads are views into the message; only names are copied.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from taskvm.wire.fuse import (
    MAX_NAME,
    MAX_WRITE,
    REQUEST_HEADER_SIZE,
    Allocate,
    CopyRange,
    Forget,
    FuseError,
    GetXattr,
    Init,
    Link,
    MakeNode,
    Name,
    Opcode,
    Read,
    Rename,
    Request,
    Seek,
    SetAttr,
    SetAttrField,
    SetXattr,
    Symlink,
    Sync,
    Write,
)

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
