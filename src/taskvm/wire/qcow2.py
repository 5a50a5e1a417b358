"""The head of a qcow2 file, read before any program opens the file, and written (docs/interop/qcow2.txt of QEMU).

Rule 1: what `parse_header` accepts names no other file unless `names_backing` says so, has no feature that this module
        does not know, and keeps its tables inside the file. Everything else is Qcow2Error.
Rule 2: a saved disk names nothing: what lies under it is said on QEMU's command line, never by the file.

The clusters and their tables are data that only QEMU reads, inside its confinement.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC = 0x514649FB
VERSION = 3
CLUSTER_BITS = 16
# At most the largest that QEMU makes; smaller than 512 bytes the format does not know.
_CLUSTER_BITS = range(9, 22)
# The largest disk: 16 TiB. QEMU would allocate its first table (2 bytes a MiB) before it reads on.
MAX_DISK_BYTES = 16 * 1024**4
HEADER_BYTES = 112
# All extensions together; those that are known are some hundreds of bytes.
MAX_HEAD_BYTES = 64 * 1024

_HEADER = struct.Struct(">IIQIIQIIQQIIQQQQII")
_EXTENSION = struct.Struct(">II")
_END = 0
_BACKING_FORMAT = 0xE2792ACA
_FEATURE_NAMES = 0x6803F857
_EXTENSIONS = frozenset({_BACKING_FORMAT, _FEATURE_NAMES})
_LAZY_REFCOUNTS = 1  # the one compatible feature there is
_REFCOUNT_ORDER = 4  # 16 bits: what everything writes that we take files from
_CLUSTER = 1 << CLUSTER_BITS


class Qcow2Error(ValueError):
    """Raised when bytes are not the head of a qcow2 file that is safe to open. The text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Header:
    """What a qcow2 file says of itself. Offsets and sizes in bytes; `names_backing`: it names a file beneath it."""

    size_bytes: int
    cluster_bits: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    names_backing: bool


def parse_header(head: bytes, file_bytes: int) -> Qcow2Header:
    """Return the header at the start of a file of `file_bytes`; `head` is its first MAX_HEAD_BYTES, or all of it.

    Raises Qcow2Error for anything but a plain disk.
    """
    if len(head) < _HEADER.size:
        raise Qcow2Error("it is too short for a qcow2 file")
    (magic, version, backing_offset, backing_size, cluster_bits, size, encryption, l1_entries, l1_offset,
     refcount_offset, refcount_clusters, snapshots, _, incompatible, compatible, autoclear, refcount_order,
     length) = _HEADER.unpack_from(head)  # fmt: skip
    if magic != MAGIC:
        raise Qcow2Error("it does not begin like a qcow2 file")
    _require(version == VERSION, f"its version is {version}, not {VERSION}")
    _require(cluster_bits in _CLUSTER_BITS, f"its clusters have 2^{cluster_bits} bytes")
    _require(0 < size <= MAX_DISK_BYTES, f"its disk has {size} bytes")
    _require(encryption == 0, "it is encrypted")
    _require(snapshots == 0, "it holds internal snapshots")
    _require(incompatible == 0, f"it has the incompatible features {incompatible:#x}")
    _require(not compatible & ~_LAZY_REFCOUNTS, f"it has the features {compatible:#x}")
    _require(autoclear == 0, f"it has the features {autoclear:#x} (bitmaps or a raw data file)")
    _require(
        refcount_order == _REFCOUNT_ORDER, f"its reference counts have 2^{refcount_order} bits"
    )
    header = Qcow2Header(
        size_bytes=size,
        cluster_bits=cluster_bits,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        refcount_offset=refcount_offset,
        refcount_clusters=refcount_clusters,
        names_backing=bool(backing_offset or backing_size),
    )
    _check_tables(header, file_bytes)
    _check_extensions(head, length)
    return header


def _check_tables(header: Qcow2Header, file_bytes: int) -> None:
    cluster = 1 << header.cluster_bits
    covered = cluster * (cluster // 8)  # one entry of the first table: a cluster full of entries
    needed = -(-header.size_bytes // covered)
    _require(
        needed <= header.l1_entries <= needed + cluster, "its first table does not fit its size"
    )
    tables = (
        (header.l1_offset, header.l1_entries * 8),
        (header.refcount_offset, header.refcount_clusters * cluster),
    )
    for offset, length in tables:
        inside = cluster <= offset and offset % cluster == 0 and offset + length <= file_bytes
        _require(inside, "a table of it lies outside of the file")


def _check_extensions(head: bytes, length: int) -> None:
    _require(104 <= length <= HEADER_BYTES and length % 8 == 0, f"its header has {length} bytes")
    if length > 104 and any(head[104:length]):
        raise Qcow2Error("it is compressed in another way than with zlib")
    position = length
    while True:
        _require(position + _EXTENSION.size <= len(head), "its extensions do not end")
        kind, size = _EXTENSION.unpack_from(head, position)
        if kind == _END:
            return
        _require(
            kind in _EXTENSIONS, f"it has the extension {kind:#010x}, which may name other files"
        )
        position += _EXTENSION.size + -(-size // 8) * 8


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Qcow2Error(reason)


def encode_header(header: Qcow2Header) -> bytes:
    """Return a header with the same tables that names no other file and has no extension."""
    fields = _HEADER.pack(
        MAGIC, VERSION, 0, 0, header.cluster_bits, header.size_bytes, 0, header.l1_entries, header.l1_offset,
        header.refcount_offset, header.refcount_clusters, 0, 0, 0, 0, 0, _REFCOUNT_ORDER, HEADER_BYTES,
    )  # fmt: skip
    return fields.ljust(HEADER_BYTES, b"\0") + _EXTENSION.pack(_END, 0)


def encode_empty(size_bytes: int) -> bytes:
    """Return a whole file: a disk of `size_bytes` in which nothing is allocated, as a layer above another begins."""
    entries = -(-size_bytes // (_CLUSTER * (_CLUSTER // 8)))
    l1_clusters = -(-entries * 8 // _CLUSTER)
    header = Qcow2Header(
        size_bytes=size_bytes,
        cluster_bits=CLUSTER_BITS,
        l1_entries=entries,
        l1_offset=3 * _CLUSTER,
        refcount_offset=_CLUSTER,
        refcount_clusters=1,
        names_backing=False,
    )
    # The header, the table of reference counts, one block of them, the first table.
    used = 3 + l1_clusters
    table = struct.pack(">Q", 2 * _CLUSTER)
    counts = struct.pack(f">{used}H", *[1] * used)
    parts = (encode_header(header), table, counts)
    return b"".join(part.ljust(_CLUSTER, b"\0") for part in parts) + bytes(l1_clusters * _CLUSTER)
