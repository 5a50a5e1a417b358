"""qcow2 files, as bytes: what a head says, where the clusters are, and how both are written (QEMU's interop/qcow2.txt).

We read what a guest, or a QEMU that it has taken over, may have written, and write what QEMU will open.

Rule 1: what `parse_header` accepts names no other file unless `names_backing` says so, has no feature that this module
        does not know, and keeps its tables inside the file. Everything else is Qcow2Error.
Rule 2: a saved disk names nothing: what lies under it is said on QEMU's command line, never by the file.
Rule 3: only plain clusters are read: no compression, no subclusters, none that lies outside of its file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAGIC = 0x514649FB
VERSION = 3
CLUSTER_BITS = 16  # 64 KiB: qemu-img's default, and the only size that we write or read
CLUSTER = 1 << CLUSTER_BITS
TABLE_ENTRIES = CLUSTER // 8  # of a table of the second level, which is one cluster
# The largest disk: 2 TiB, as of `disk_size_mib` (limits.py). QEMU would allocate its first table before it reads on.
MAX_DISK_BYTES = 2 * 1024**4
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
# An entry of a table (qcow2.txt, "Cluster mapping"): bits 9-55 are the offset.
_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_OFFSET = (1 << 56) - (1 << 9)
_READS_AS_ZEROS = 1


class Qcow2Error(ValueError):
    """Raised when bytes are not the head of a qcow2 file that is safe to open. The text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Header:
    """What a qcow2 file says of itself. Offsets and sizes in bytes; `names_backing`: it names a file beneath it."""

    size_bytes: int
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
    require(version == VERSION, f"its version is {version}, not {VERSION}")
    require(cluster_bits == CLUSTER_BITS, f"its clusters have 2^{cluster_bits} bytes")
    require(0 < size <= MAX_DISK_BYTES, f"its disk has {size} bytes")
    require(encryption == 0, "it is encrypted")
    require(snapshots == 0, "it holds internal snapshots")
    require(incompatible == 0, f"it has the incompatible features {incompatible:#x}")
    require(not compatible & ~_LAZY_REFCOUNTS, f"it has the features {compatible:#x}")
    require(autoclear == 0, f"it has the features {autoclear:#x} (bitmaps or a raw data file)")
    require(refcount_order == _REFCOUNT_ORDER, f"its reference counts have 2^{refcount_order} bits")
    header = Qcow2Header(
        size_bytes=size,
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
    needed = _tables_for(header.size_bytes)
    require(
        needed <= header.l1_entries <= needed + CLUSTER, "its first table does not fit its size"
    )
    tables = (
        (header.l1_offset, header.l1_entries * 8),
        (header.refcount_offset, header.refcount_clusters * CLUSTER),
    )
    for offset, length in tables:
        inside = offset >= CLUSTER and offset % CLUSTER == 0 and offset + length <= file_bytes
        require(inside, "a table of it lies outside of the file")


def _tables_for(size_bytes: int) -> int:
    return -(-size_bytes // (CLUSTER * TABLE_ENTRIES))


def _check_extensions(head: bytes, length: int) -> None:
    require(104 <= length <= HEADER_BYTES and length % 8 == 0, f"its header has {length} bytes")
    if length > 104 and any(head[104:length]):
        raise Qcow2Error("it is compressed in another way than with zlib")
    position = length
    while True:
        require(position + _EXTENSION.size <= len(head), "its extensions do not end")
        kind, size = _EXTENSION.unpack_from(head, position)
        if kind == _END:
            return
        require(
            kind in _EXTENSIONS, f"it has the extension {kind:#010x}, which may name other files"
        )
        position += _EXTENSION.size + -(-size // 8) * 8


def require(condition: bool, reason: str) -> None:
    """Raise Qcow2Error with the reason unless the condition holds."""
    if not condition:
        raise Qcow2Error(reason)


# Where the clusters are.


def decode_tables(first: bytes, file_bytes: int) -> list[int]:
    """Return the offsets of the second tables that the first one names, 0 where there is none. Raises Qcow2Error."""
    last = max(1, file_bytes - CLUSTER + 1)  # a table is whole; data may be cut off behind it
    return [_offset(entry, last) for (entry,) in struct.iter_unpack(">Q", first)]


def decode_clusters(table: bytes, file_bytes: int) -> Iterator[tuple[int, int]]:
    """Return (place in the table, offset in the file) of its clusters, offset 0 for one of zeros. Raises Qcow2Error."""
    for place, (entry,) in enumerate(struct.iter_unpack(">Q", table)):
        require(not entry & _COMPRESSED, "it has compressed clusters")
        if entry & _READS_AS_ZEROS:
            yield place, 0
        elif offset := _offset(entry, file_bytes):
            yield place, offset


def _offset(entry: int, end: int) -> int:
    offset = entry & _OFFSET
    require(
        offset % CLUSTER == 0 and offset < end and not entry & ~(_OFFSET | _COPIED),
        "a cluster of it lies outside of the file",
    )
    return offset


# Writing.


def encode_empty(size_bytes: int) -> bytes:
    """Return a whole file: a disk of `size_bytes` in which nothing is allocated, as a layer above another begins."""
    return encode_head(size_bytes, [], frozenset())


def encode_head(size_bytes: int, clusters: Sequence[int], zeros: frozenset[int]) -> bytes:
    """Return all of a file but its data: it has `clusters` of the disk, in rising order, and of them `zeros` are zeros.

    The data of the others follows at the end of what is returned, in the same order. It names no other file.
    """
    tables = sorted({cluster // TABLE_ENTRIES for cluster in clusters})
    first_entries = _tables_for(size_bytes)
    first_clusters = -(-first_entries * 8 // CLUSTER)
    data = len(clusters) - len(zeros)
    counted = _Counted.of(1 + first_clusters + len(tables) + data)
    first_at = (1 + counted.table + counted.blocks) * CLUSTER
    second_at = first_at + first_clusters * CLUSTER
    data_at = second_at + len(tables) * CLUSTER
    first = [0] * first_entries
    for number, table in enumerate(tables):
        first[table] = _COPIED | second_at + number * CLUSTER
    header = Qcow2Header(
        size_bytes=size_bytes,
        l1_entries=first_entries,
        l1_offset=first_at,
        refcount_offset=CLUSTER,
        refcount_clusters=counted.table,
        names_backing=False,
    )
    return b"".join(
        (
            encode_header(header).ljust(CLUSTER, b"\0"),
            counted.encode(),
            _encode_table(first).ljust(first_clusters * CLUSTER, b"\0"),
            *_second_tables(tables, clusters, zeros, data_at),
        )
    )


def encode_header(header: Qcow2Header) -> bytes:
    """Return a header that names no other file and has no extension."""
    fields = _HEADER.pack(
        MAGIC, VERSION, 0, 0, CLUSTER_BITS, header.size_bytes, 0, header.l1_entries, header.l1_offset,
        header.refcount_offset, header.refcount_clusters, 0, 0, 0, 0, 0, _REFCOUNT_ORDER, HEADER_BYTES,
    )  # fmt: skip
    return fields.ljust(HEADER_BYTES, b"\0") + _EXTENSION.pack(_END, 0)


@dataclass(frozen=True, slots=True)
class _Counted:
    """Reference counts, all 1: the clusters of their table, their blocks, and how many clusters the file has."""

    table: int
    blocks: int
    clusters: int

    @classmethod
    def of(cls, others: int) -> _Counted:
        """Return what counts `others` clusters and itself."""
        per_block = CLUSTER // 2
        table = blocks = 1
        while True:
            total = others + table + blocks
            needed = -(-total // per_block)
            if needed <= blocks:
                return cls(table, blocks, total)
            blocks = needed
            table = -(-blocks * 8 // CLUSTER)

    def encode(self) -> bytes:
        first_block = 1 + self.table
        table = _encode_table([(first_block + number) * CLUSTER for number in range(self.blocks)])
        counts = struct.pack(">H", 1) * self.clusters
        return table.ljust(self.table * CLUSTER, b"\0") + counts.ljust(self.blocks * CLUSTER, b"\0")


def _second_tables(
    tables: Sequence[int], clusters: Sequence[int], zeros: frozenset[int], data_at: int
) -> Iterator[bytes]:
    entries = {table: [0] * TABLE_ENTRIES for table in tables}
    for cluster in clusters:
        table, place = divmod(cluster, TABLE_ENTRIES)
        if cluster in zeros:
            entries[table][place] = _READS_AS_ZEROS
        else:
            entries[table][place] = _COPIED | data_at
            data_at += CLUSTER
    return (_encode_table(entries[table]) for table in tables)


def _encode_table(entries: Sequence[int]) -> bytes:
    return struct.pack(f">{len(entries)}Q", *entries)
