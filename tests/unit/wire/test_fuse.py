"""The FUSE codec: what the kernel says is understood, what it could not say is FuseError and nothing else."""

from __future__ import annotations

import re
import struct
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.fs.session import FLAGS
from taskvm.wire import fuse
from taskvm.wire.fuse import FuseError, Init, InitFlag, Opcode, Request
from taskvm.wire.fuse_replies import (
    DirectoryReply,
    Lifetime,
    StatFs,
    encode_attr,
    encode_delete,
    encode_entry,
    encode_error,
    encode_init,
    encode_inval_entry,
    encode_inval_inode,
    encode_negative_entry,
    encode_open,
    encode_reply_header,
    encode_seek,
    encode_statfs,
    encode_store,
    encode_written,
)
from taskvm.wire.fuse_requests import decode_request

ATTR = SimpleNamespace(
    st_ino=0x1122_3344_5566_7788,
    st_mode=0o100640,
    st_nlink=3,
    st_uid=1000,
    st_gid=1001,
    st_size=1 << 40,
    st_blocks=7,
    st_blksize=4096,
    st_atime_ns=5_000_000_006,
    st_mtime_ns=-1,
    st_ctime_ns=0,
)
LIFETIME = Lifetime(entry_ns=1_500_000_000, attr_ns=250_000_000)


def message(opcode: int, body: bytes = b"", *, node: int = 1, length: int | None = None) -> bytes:
    total = 40 + len(body) if length is None else length
    return struct.pack("<IIQQIIIHH", total, opcode, 99, node, 1000, 1001, 77, 0, 0) + body


def decode(opcode: int, body: bytes = b"") -> object:
    return decode_request(memoryview(message(opcode, body))).arguments


CONVERSATION = [
    (Opcode.LOOKUP, b"name\0", fuse.Name(b"name")),
    (Opcode.FORGET, struct.pack("<Q", 5), fuse.Forget(((1, 5),))),
    (
        Opcode.BATCH_FORGET,
        struct.pack("<IIQQQQ", 2, 0, 8, 1, 9, 2),
        fuse.Forget(((8, 1), (9, 2))),
    ),
    (Opcode.GETATTR, bytes(16), None),
    (
        Opcode.SETATTR,
        struct.pack("<IIQQQqqqIIIIIIII", 57, 0, 0, 6, 0, -5, 3, 0, 7, 8, 0, 0o640, 0, 1, 2, 0),
        fuse.SetAttr(57, 6, -4_999_999_993, 3_000_000_008, 0o640, 1, 2),
    ),
    (Opcode.SYMLINK, b"name\0../target\0", fuse.Symlink(b"name", b"../target")),
    (Opcode.MKNOD, struct.pack("<IIII", 0o100600, 0, 0, 0) + b"n\0", fuse.MakeNode(b"n", 0o100600)),
    (Opcode.MKDIR, struct.pack("<II", 0o700, 0) + b"n\0", fuse.MakeNode(b"n", 0o700)),
    (Opcode.CREATE, struct.pack("<IIII", 2, 0o600, 0, 0) + b"n\0", fuse.MakeNode(b"n", 0o600, 2)),
    (Opcode.UNLINK, b"n\0", fuse.Name(b"n")),
    (Opcode.RMDIR, b"n\0", fuse.Name(b"n")),
    (Opcode.RENAME, struct.pack("<Q", 4) + b"a\0b\0", fuse.Rename(4, 0, b"a", b"b")),
    (Opcode.RENAME2, struct.pack("<QII", 4, 2, 0) + b"a\0b\0", fuse.Rename(4, 2, b"a", b"b")),
    (Opcode.LINK, struct.pack("<Q", 4) + b"a\0", fuse.Link(4, b"a")),
    (Opcode.READ, struct.pack("<QQIIQII", 0, 10, 20, 0, 0, 0, 0), fuse.Read(10, 20)),
    (
        Opcode.READDIR,
        struct.pack("<QQIIQII", 0, 2**64 - 1, 4096, 0, 0, 0, 0),
        fuse.Read(2**64 - 1, 4096),
    ),
    (
        Opcode.WRITE,
        struct.pack("<QQIIQII", 0, 10, 4, 1, 0, 0o2001, 0) + b"data",
        fuse.Write(10, memoryview(b"data"), 1, 0o2001),
    ),
    (Opcode.FSYNC, struct.pack("<QII", 0, 1, 0), fuse.Sync(True)),
    (
        Opcode.SETXATTR,
        struct.pack("<II", 3, 1) + b"user.a\0\0v\0",
        fuse.SetXattr(b"user.a", b"\0v\0", 1),
    ),
    (Opcode.GETXATTR, struct.pack("<II", 9, 0) + b"user.a/b\0", fuse.GetXattr(b"user.a/b", 9)),
    (Opcode.LISTXATTR, struct.pack("<II", 9, 0), fuse.GetXattr(b"", 9)),
    (Opcode.REMOVEXATTR, b"user.a\0", fuse.Name(b"user.a")),
    (Opcode.FALLOCATE, struct.pack("<QQQII", 0, 1, 2, 3, 0), fuse.Allocate(1, 2, 3)),
    (Opcode.LSEEK, struct.pack("<QQII", 0, 1, 3, 0), fuse.Seek(1, 3)),
    (
        Opcode.COPY_FILE_RANGE,
        struct.pack("<QQQQQQQ", 0, 1, 5, 0, 2, 3, 0),
        fuse.CopyRange(1, 5, 2, 3),
    ),
    (Opcode.INIT, struct.pack("<IIII", 7, 37, 131072, 0xFF) + bytes(48), Init(7, 37, 131072, 0xFF)),
    (Opcode.STATFS, b"", None),
    (9999, b"anything", None),
]


@pytest.mark.parametrize(("opcode", "body", "arguments"), CONVERSATION)
def test_a_request_is_understood(opcode: int, body: bytes, arguments: object) -> None:
    request = decode_request(memoryview(message(opcode, body, node=1)))

    assert request == Request(opcode, 99, 1, 1000, 1001, arguments)


FIXED = [case for case in CONVERSATION if case[1] and case[0] not in (9999, Opcode.INIT)]


@pytest.mark.parametrize(("opcode", "body", "arguments"), FIXED)
def test_a_truncated_request_is_refused(opcode: int, body: bytes, arguments: object) -> None:
    for cut in range(len(body)):
        with pytest.raises(FuseError):
            decode(opcode, body[:cut])


def test_init_may_grow_but_not_shrink() -> None:
    body = struct.pack("<IIII", 7, 99, 0, 0)
    assert decode(Opcode.INIT, body + bytes(500)) == Init(7, 99, 0, 0)
    with pytest.raises(FuseError):
        decode(Opcode.INIT, body[:15])


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(39),
        message(Opcode.STATFS, length=41),
        message(Opcode.STATFS, length=39),
        message(Opcode.STATFS)[:36] + struct.pack("<HH", 1, 0),
    ],
)
def test_a_wrong_header_is_refused(raw: bytes) -> None:
    with pytest.raises(FuseError):
        decode_request(memoryview(raw))


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"/", b"x" * 4096])
def test_a_name_is_one_component(name: bytes) -> None:
    with pytest.raises(FuseError):
        decode(Opcode.LOOKUP, name + b"\0")


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.READ, struct.pack("<QQIIQII", 0, 2**63, 1, 0, 0, 0, 0)),
        (Opcode.READ, struct.pack("<QQIIQII", 0, 0, fuse.MAX_WRITE + 1, 0, 0, 0, 0)),
        (Opcode.WRITE, struct.pack("<QQIIQII", 0, 0, 5, 0, 0, 0, 0) + b"four"),
        (Opcode.SETATTR, struct.pack("<IIQQQqqqIIIIIIII", 8, 0, 0, 2**63, *[0] * 12)),
        (Opcode.SETATTR, struct.pack("<IIQQQqqqIIIIIIII", 16, *[0] * 7, 10**9, *[0] * 7)),
        (Opcode.SYMLINK, b"name\0\0"),
        (Opcode.SYMLINK, b"name\0a\0b\0"),
        (Opcode.SETXATTR, struct.pack("<II", 0, 0) + b"\0"),
        (Opcode.GETXATTR, struct.pack("<II", 0, 0) + b"x" * 256 + b"\0"),
        (Opcode.BATCH_FORGET, struct.pack("<II", 3, 0) + bytes(32)),
        (Opcode.COPY_FILE_RANGE, struct.pack("<QQQQQQQ", 0, 1, 5, 0, 2, 3, 1)),
        (Opcode.LSEEK, struct.pack("<QQII", 0, 2**63, 3, 0)),
        (Opcode.FALLOCATE, struct.pack("<QQQII", 0, 0, 2**63, 0, 0)),
    ],
)
def test_what_no_kernel_sends_is_refused(opcode: int, body: bytes) -> None:
    with pytest.raises(FuseError):
        decode(opcode, body)


@given(st.binary(max_size=300))
def test_random_bytes_raise_only_the_documented_error(raw: bytes) -> None:
    with suppress(FuseError):
        assert isinstance(decode_request(memoryview(raw)), Request)


@given(st.sampled_from(Opcode), st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_random_bodies_raise_only_the_documented_error(op: Opcode, body: bytes, node: int) -> None:
    with suppress(FuseError):
        assert decode_request(memoryview(message(op, body, node=node))).node == node


@given(st.binary(min_size=1, max_size=300))
def test_a_name_that_is_decoded_is_always_one_component(name: bytes) -> None:
    try:
        decoded = decode(Opcode.LOOKUP, name + b"\0")
    except FuseError:
        return
    assert isinstance(decoded, fuse.Name)
    assert decoded.name == name
    assert b"/" not in name
    assert b"\0" not in name
    assert name not in (b".", b"..")


# Replies. Their sizes are those of linux/fuse.h; the kernel refuses any other.


def body_of(reply: bytes, size: int) -> bytes:
    length, error, unique = struct.unpack_from("<IiQ", reply)
    assert (length, error, unique, len(reply)) == (16 + size, 0, 99, 16 + size)
    return reply[16:]


ATTR_FIELDS = (0x1122_3344_5566_7788, 1 << 40, 7, 5, -1, 0, 6, 999_999_999, 0, 0o100640, 3)


def test_an_entry_is_told() -> None:
    body = body_of(encode_entry(99, 42, ATTR, LIFETIME), 128)

    assert struct.unpack_from("<QQQQII", body) == (42, 0, 1, 0, 500_000_000, 250_000_000)
    fields = struct.unpack_from("<QQQqqqIIIIIIIIII", body, 40)
    assert fields == (*ATTR_FIELDS, 1000, 1001, 0, 4096, 0)


def test_a_created_file_is_told_with_its_handle() -> None:
    body = body_of(encode_entry(99, 42, ATTR, LIFETIME, encode_open(0, 0)), 144)
    assert body[128:] == bytes(16)


def test_attributes_are_told() -> None:
    body = body_of(encode_attr(99, ATTR, LIFETIME), 104)
    assert struct.unpack_from("<QII", body) == (0, 250_000_000, 0)
    assert struct.unpack_from("<QQQqqqIIIII", body, 16) == ATTR_FIELDS


def test_a_name_that_is_nothing_can_be_remembered() -> None:
    body = body_of(encode_negative_entry(99, 1_000_000_002), 128)
    assert struct.unpack_from("<QQQQII", body) == (0, 0, 1, 0, 2, 0)


def test_short_replies() -> None:
    statfs = StatFs(
        blocks=1,
        free=2,
        available=3,
        files=4,
        files_free=5,
        block_size=6,
        fragment_size=7,
        max_name=8,
    )
    assert encode_error(99, 2) == struct.pack("<IiQ", 16, -2, 99)
    assert encode_reply_header(99, 5) == struct.pack("<IiQ", 21, 0, 99)
    assert body_of(encode_written(99, 7), 8) == struct.pack("<II", 7, 0)
    assert body_of(encode_seek(99, 7), 8) == struct.pack("<Q", 7)
    assert struct.unpack_from("<QQQQQIIII", body_of(encode_statfs(99, statfs), 80)) == (
        *(1, 2, 3, 4, 5, 6, 8, 7, 0),
    )


def test_init_negotiates_down() -> None:
    body = body_of(encode_init(99, Init(7, 50, 131072, 0xFFFF_FFFF), FLAGS, 64), 64)

    major, minor, readahead, flags, background, congestion, max_write, _, max_pages = (
        struct.unpack_from("<IIIIHHIIH", body)
    )
    assert (major, minor, readahead, flags) == (7, 38, 131072, FLAGS)
    assert (background, congestion, max_write, max_pages) == (64, 48, 1 << 20, 256)


def test_init_offers_only_what_the_kernel_has() -> None:
    body = body_of(encode_init(99, Init(7, 31, 4096, InitFlag.ASYNC_READ), FLAGS, 64), 64)
    assert struct.unpack_from("<IIII", body) == (7, 31, 4096, InitFlag.ASYNC_READ)


def test_a_later_major_is_told_ours_and_an_old_kernel_refused() -> None:
    body = body_of(encode_init(99, Init(8, 0, 4096, 0), FLAGS, 64), 64)
    assert struct.unpack_from("<II", body) == (7, 38)
    with pytest.raises(FuseError):
        encode_init(99, Init(7, 30, 0, 0), FLAGS, 64)


def test_what_would_lose_data_or_block_is_never_offered() -> None:
    atomic_trunc, posix_locks, flock, writeback = 1 << 3, 1 << 1, 1 << 10, 1 << 16
    assert not FLAGS & (atomic_trunc | posix_locks | flock | writeback)


@given(st.lists(st.binary(min_size=1, max_size=255), max_size=60), st.integers(0, 4096))
def test_a_directory_is_never_longer_than_asked(names: list[bytes], size: int) -> None:
    for plus in (False, True):
        reply = DirectoryReply(99, size)
        told = []
        for number, name in enumerate(names):
            if not reply.fits(name, plus=plus):
                break
            if plus:
                reply.add_plus(7, ATTR, LIFETIME)
            reply.add(number, number + 1, 8, name)
            told.append(name)

        encoded = reply.encode()
        assert len(encoded) <= 16 + size
        assert parse_directory(encoded[16:], plus=plus) == told


def parse_directory(body: bytes, *, plus: bool) -> list[bytes]:
    names, position = [], 0
    while position < len(body):
        position += 128 if plus else 0
        _ino, _offset, length, _kind = struct.unpack_from("<QQII", body, position)
        names.append(body[position + 24 : position + 24 + length])
        position += (24 + length + 7) & ~7
    assert position == len(body)
    return names


def test_notifications() -> None:
    def head(code: int, size: int) -> bytes:
        return struct.pack("<IiQ", 16 + size, code, 0)

    assert encode_inval_inode(7) == head(2, 24) + struct.pack("<Qqq", 7, 0, 0)
    assert encode_inval_entry(7, b"ab") == head(3, 19) + struct.pack("<QII", 7, 2, 0) + b"ab\0"
    assert encode_delete(7, 8, b"ab") == head(6, 27) + struct.pack("<QQII", 7, 8, 2, 0) + b"ab\0"
    assert encode_store(7, 8, b"ab") == head(4, 26) + struct.pack("<QQII", 7, 8, 2, 0) + b"ab"


@pytest.mark.skipif(not Path("/usr/include/linux/fuse.h").exists(), reason="no kernel headers")
def test_the_numbers_are_the_kernels() -> None:
    header = Path("/usr/include/linux/fuse.h").read_text()
    kernels = dict(re.findall(r"FUSE_([A-Z0-9_]+)\s*=\s*(\d+),", header))
    assert {o.name: str(int(o)) for o in Opcode}.items() <= kernels.items()
