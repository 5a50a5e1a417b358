"""What a FUSE mount answers: replies and notifications, encoded to bytes. Requests are in fuse.py.

The format is linux/fuse.h, protocol 7.31 to 7.38. A reply is a 16-byte header (length, -errno, the request's
`unique`) and a body whose size the kernel checks: one byte too many or too few is EINVAL for the writer.
Everything is packed in one call where it is hot (LOOKUP, GETATTR, READDIRPLUS).
"""

from __future__ import annotations

import struct
from typing import Protocol

import msgspec

from taskvm.wire.fuse import (
    KERNEL_MAJOR,
    KERNEL_MINOR,
    MAX_PAGES,
    MAX_WRITE,
    OLDEST_MINOR,
    FuseError,
    Init,
    InitFlag,
)


class Attr(Protocol):
    """The attributes of a node. An os.stat_result has them all."""

    @property
    def st_ino(self) -> int: ...
    @property
    def st_mode(self) -> int: ...
    @property
    def st_nlink(self) -> int: ...
    @property
    def st_uid(self) -> int: ...
    @property
    def st_gid(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_blocks(self) -> int: ...
    @property
    def st_blksize(self) -> int: ...
    @property
    def st_atime_ns(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...


class StatFs(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """STATFS: sizes in blocks of `fragment_size` bytes."""

    blocks: int
    free: int
    available: int
    files: int
    files_free: int
    block_size: int
    fragment_size: int
    max_name: int


class Lifetime(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """How long the guest may believe what it was told, in ns. 0: ask again each time."""

    entry_ns: int
    attr_ns: int


_NS = 1_000_000_000
_OUT = struct.Struct("<IiQ")
_ATTR_LAYOUT = "QQQqqqIIIIIIIIII"
_ENTRY = struct.Struct("<IiQ" + "QQQQII" + _ATTR_LAYOUT)
_ATTR_OUT = struct.Struct("<IiQ" + "QII" + _ATTR_LAYOUT)
_OPEN_OUT = struct.Struct("<QII")
_WRITE_OUT = struct.Struct("<II")
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_LSEEK_OUT = struct.Struct("<Q")
_DIRENT = struct.Struct("<QQII")
_OUT_SIZE = _OUT.size
_ENTRY_SIZE = _ENTRY.size - _OUT_SIZE
_NO_ENTRY = bytes(_ENTRY_SIZE)
# A device number of the host means nothing in the guest.
_NO_DEVICE = 0


def encode_error(unique: int, errno: int) -> bytes:
    """Return the reply that says `errno`."""
    return _OUT.pack(_OUT_SIZE, -errno, unique)


def encode_reply(unique: int, body: bytes = b"") -> bytes:
    """Return a successful reply."""
    return _OUT.pack(_OUT_SIZE + len(body), 0, unique) + body


def encode_reply_header(unique: int, length: int) -> bytes:
    """Return what goes before a body of `length` bytes that is sent from where it is."""
    return _OUT.pack(_OUT_SIZE + length, 0, unique)


def encode_entry(
    unique: int, node: int, attr: Attr, lifetime: Lifetime, more: bytes = b""
) -> bytes:
    """Return the reply to LOOKUP, MKNOD, MKDIR, SYMLINK, LINK; with `more`, to CREATE."""
    return _entry(_ENTRY.size + len(more), unique, node, attr, lifetime) + more


def encode_negative_entry(unique: int, entry_ns: int) -> bytes:
    """Return the reply to LOOKUP that lets the guest remember for `entry_ns` that the name does not exist."""
    seconds, rest = divmod(entry_ns, _NS)
    return encode_reply(
        unique, struct.pack("<QQQQII", 0, 0, seconds, 0, rest, 0) + bytes(_ENTRY_SIZE - 40)
    )


def _entry(length: int, unique: int, node: int, attr: Attr, lifetime: Lifetime) -> bytes:
    entry_s, entry_ns = divmod(lifetime.entry_ns, _NS)
    attr_s, attr_ns = divmod(lifetime.attr_ns, _NS)
    atime_s, atime_ns = divmod(attr.st_atime_ns, _NS)
    mtime_s, mtime_ns = divmod(attr.st_mtime_ns, _NS)
    ctime_s, ctime_ns = divmod(attr.st_ctime_ns, _NS)
    return _ENTRY.pack(
        length,
        0,
        unique,
        node,
        0,  # generation: node ids are never used twice
        entry_s,
        attr_s,
        entry_ns,
        attr_ns,
        attr.st_ino,
        attr.st_size,
        attr.st_blocks,
        atime_s,
        mtime_s,
        ctime_s,
        atime_ns,
        mtime_ns,
        ctime_ns,
        attr.st_mode,
        attr.st_nlink,
        attr.st_uid,
        attr.st_gid,
        _NO_DEVICE,
        attr.st_blksize,
        0,
    )


def encode_attr(unique: int, attr: Attr, lifetime: Lifetime) -> bytes:
    """Return the reply to GETATTR and SETATTR."""
    attr_s, attr_ns = divmod(lifetime.attr_ns, _NS)
    atime_s, atime_ns = divmod(attr.st_atime_ns, _NS)
    mtime_s, mtime_ns = divmod(attr.st_mtime_ns, _NS)
    ctime_s, ctime_ns = divmod(attr.st_ctime_ns, _NS)
    return _ATTR_OUT.pack(
        _ATTR_OUT.size,
        0,
        unique,
        attr_s,
        attr_ns,
        0,
        attr.st_ino,
        attr.st_size,
        attr.st_blocks,
        atime_s,
        mtime_s,
        ctime_s,
        atime_ns,
        mtime_ns,
        ctime_ns,
        attr.st_mode,
        attr.st_nlink,
        attr.st_uid,
        attr.st_gid,
        _NO_DEVICE,
        attr.st_blksize,
        0,
    )


def encode_open(fh: int, flags: int) -> bytes:
    """Return fuse_open_out, the second half of the reply to CREATE."""
    return _OPEN_OUT.pack(fh, flags, 0)


def encode_written(unique: int, size: int) -> bytes:
    """Return the reply to WRITE, COPY_FILE_RANGE and, for a length, GETXATTR and LISTXATTR."""
    return encode_reply(unique, _WRITE_OUT.pack(size, 0))


def encode_seek(unique: int, offset: int) -> bytes:
    """Return the reply to LSEEK."""
    return encode_reply(unique, _LSEEK_OUT.pack(offset))


def encode_statfs(unique: int, stat: StatFs) -> bytes:
    """Return the reply to STATFS."""
    body = _STATFS_OUT.pack(
        stat.blocks,
        stat.free,
        stat.available,
        stat.files,
        stat.files_free,
        stat.block_size,
        stat.max_name,
        stat.fragment_size,
        0,
    )
    return encode_reply(unique, body)


def encode_init(unique: int, request: Init, flags: InitFlag, background: int) -> bytes:
    """Return the reply to INIT: the flags of `flags` that the kernel has, and `background` requests at once.

    A kernel of a later major sends INIT again when it reads ours. Raises FuseError for one that is too old.
    """
    if (request.major, request.minor) < (KERNEL_MAJOR, OLDEST_MINOR):
        raise FuseError(f"the guest's kernel speaks FUSE {request.major}.{request.minor}")
    body = _INIT_OUT.pack(
        KERNEL_MAJOR,
        min(request.minor, KERNEL_MINOR) if request.major == KERNEL_MAJOR else KERNEL_MINOR,
        request.max_readahead,
        flags & request.flags,
        background,
        background * 3 // 4,  # the kernel's own ratio of congestion to background
        MAX_WRITE,
        1,  # time_gran: times are exact to the nanosecond
        MAX_PAGES,
        0,
        0,
    )
    return encode_reply(unique, body)


class DirectoryReply:
    """The growing reply to READDIR and READDIRPLUS, never longer than the kernel asked for."""

    def __init__(self, unique: int, size: int) -> None:
        self._unique = unique
        self._room = size
        self._parts: list[bytes] = []

    def fits(self, name: bytes, *, plus: bool) -> bool:
        """Tell whether an entry of this name still has room."""
        need = (_DIRENT.size + len(name) + 7) & ~7
        return need + (_ENTRY_SIZE if plus else 0) <= self._room

    def add(self, ino: int, offset: int, kind: int, name: bytes) -> None:
        """Append an entry that `fits`; `kind` is a DT_* number, `offset` resumes after it."""
        length = len(name)
        self._append(_DIRENT.pack(ino, offset, length, kind) + name + b"\0" * (-length & 7))

    def add_plus(self, node: int, attr: Attr, lifetime: Lifetime) -> None:
        """Append the first half of an entry of READDIRPLUS, for a node that now has one reference more."""
        self._append(_entry(0, 0, node, attr, lifetime)[_OUT_SIZE:])

    def add_plus_nothing(self) -> None:
        """Append the first half of an entry of READDIRPLUS of which only the name is told."""
        self._append(_NO_ENTRY)

    def encode(self) -> bytes:
        """Return the reply."""
        return encode_reply(self._unique, b"".join(self._parts))

    def _append(self, part: bytes) -> None:
        self._room -= len(part)
        self._parts.append(part)


# Notifications: unasked messages, with unique 0 and the code in the place of the errno.

_NOTIFY_INVAL_INODE = 2
_NOTIFY_INVAL_ENTRY = 3
_NOTIFY_STORE = 4
_NOTIFY_DELETE = 6


def _notification(code: int, body: bytes) -> bytes:
    return _OUT.pack(_OUT_SIZE + len(body), code, 0) + body


def encode_inval_inode(node: int, offset: int = 0, length: int = 0) -> bytes:
    """Drop a node's attributes and pages; `length` 0: to the end, `offset` -1: attributes only."""
    return _notification(_NOTIFY_INVAL_INODE, struct.pack("<Qqq", node, offset, length))


def encode_inval_entry(parent: int, name: bytes) -> bytes:
    """Forget what `name` in `parent` stood for, positive or negative."""
    return _notification(
        _NOTIFY_INVAL_ENTRY, struct.pack("<QII", parent, len(name), 0) + name + b"\0"
    )


def encode_delete(parent: int, child: int, name: bytes) -> bytes:
    """Tell that `name` in `parent`, which was `child`, is gone."""
    return _notification(
        _NOTIFY_DELETE, struct.pack("<QQII", parent, child, len(name), 0) + name + b"\0"
    )


def encode_store(node: int, offset: int, data: bytes) -> bytes:
    """Put `data` into the guest's page cache. It overwrites dirty pages: only without writers."""
    return _notification(_NOTIFY_STORE, struct.pack("<QQII", node, offset, len(data), 0) + data)
