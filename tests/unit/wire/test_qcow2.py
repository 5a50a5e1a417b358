"""Heads of qcow2 files: a plain disk is read, and what could lead a tool elsewhere is refused before it opens it."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.wire.qcow2 import (
    HEADER_BYTES,
    MAX_DISK_BYTES,
    Qcow2Error,
    encode_empty,
    encode_header,
    parse_header,
)

GIB = 1024**3
EMPTY = encode_empty(GIB)


def changed(offset: int, kind: str, value: int) -> bytes:
    """An empty disk with one field of its header changed."""
    head = bytearray(EMPTY)
    struct.pack_into(f">{kind}", head, offset, value)
    return bytes(head)


def with_extension(kind: int, data: bytes) -> bytes:
    head = bytearray(EMPTY)
    padded = data.ljust(-(-len(data) // 8) * 8, b"\0")
    extension = struct.pack(">II", kind, len(data)) + padded + bytes(8)
    head[HEADER_BYTES : HEADER_BYTES + len(extension)] = extension
    return bytes(head)


def test_an_empty_disk_is_read_back() -> None:
    """What is written here is a plain disk of the size that was asked for."""
    header = parse_header(EMPTY, len(EMPTY))

    assert (header.size_bytes, header.names_backing) == (GIB, False)


def test_a_rewritten_header_names_nothing() -> None:
    """The name of a file beneath goes; the tables stay where they are."""
    named = parse_header(changed(8, "Q", 512), len(EMPTY))

    rewritten = parse_header(encode_header(named) + bytes(1024), len(EMPTY))

    assert named.names_backing
    assert not rewritten.names_backing
    assert rewritten.l1_offset == named.l1_offset


@pytest.mark.parametrize(
    ("offset", "kind", "value", "reason"),
    [
        (0, "I", 0x514649FC, "begin like"),
        (4, "I", 2, "version"),
        (20, "I", 8, "clusters"),
        (20, "I", 31, "clusters"),
        (24, "Q", 0, "bytes"),
        (24, "Q", MAX_DISK_BYTES + 1, "bytes"),
        (32, "I", 1, "encrypted"),
        (36, "I", 0, "first table"),
        (36, "I", 0xFFFFFFFF, "first table"),
        (40, "Q", 0, "outside"),
        (40, "Q", 1 << 40, "outside"),
        (40, "Q", 65537, "outside"),
        (48, "Q", 1 << 63, "outside"),
        (56, "I", 0xFFFFFFFF, "outside"),
        (60, "I", 1, "snapshots"),
        (72, "Q", 1, "incompatible"),
        (72, "Q", 4, "incompatible"),
        (72, "Q", 1 << 40, "incompatible"),
        (80, "Q", 2, "features"),
        (88, "Q", 1, "features"),
        (88, "Q", 2, "features"),
        (96, "I", 6, "reference counts"),
        (100, "I", 0xFFFFFFF8, "header has"),
        (104, "Q", 1 << 56, "compressed"),
    ],
)
def test_a_head_that_is_not_plain_is_refused(
    offset: int, kind: str, value: int, reason: str
) -> None:
    """Encrypted, snapshots, a data file of its own, unknown features, tables that are elsewhere."""
    with pytest.raises(Qcow2Error, match=reason):
        parse_header(changed(offset, kind, value), len(EMPTY))


def test_an_extension_that_names_a_file_is_refused() -> None:
    """0x44415441 is the name of an external data file; one that nobody knows could be anything."""
    for kind in (0x44415441, 0x0537BE77, 0x23852875, 0x12345678):
        with pytest.raises(Qcow2Error, match="extension"):
            parse_header(with_extension(kind, b"/etc/passwd"), len(EMPTY))


def test_extensions_without_an_end_are_refused() -> None:
    endless = with_extension(0x6803F857, bytes(48))

    with pytest.raises(Qcow2Error, match="do not end"):
        parse_header(endless[: HEADER_BYTES + 8], len(EMPTY))


@given(st.binary(max_size=600))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Qcow2Error):
        parse_header(data, len(data))


@given(st.integers(0, HEADER_BYTES + 16), st.binary(min_size=1, max_size=8))
def test_a_damaged_head_is_plain_or_refused(offset: int, data: bytes) -> None:
    """Nothing but Qcow2Error, and what is accepted keeps its tables inside the file."""
    damaged = EMPTY[:offset] + data + EMPTY[offset + len(data) :]

    try:
        header = parse_header(damaged, len(EMPTY))
    except Qcow2Error:
        return
    assert header.l1_offset + 8 * header.l1_entries <= len(EMPTY)
    assert 0 < header.size_bytes <= MAX_DISK_BYTES
