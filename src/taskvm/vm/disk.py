"""Disks as files: empty layers, and the one file that says what several layers say.

Every format is named, none is ever guessed from a file's content. A layer's bytes come from a guest, and from a QEMU
that a guest may have taken over: no tool of the host's opens it, and what is made of it is written by us alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from taskvm.errors import HostError
from taskvm.vm.command import Disk
from taskvm.vm.extents import copy_extent
from taskvm.wire.qcow2 import (
    CLUSTER,
    MAX_HEAD_BYTES,
    TABLE_ENTRIES,
    Qcow2Error,
    Qcow2Header,
    decode_clusters,
    decode_tables,
    encode_empty,
    encode_head,
    parse_header,
)


def create_layer(path: Path, beneath: Disk) -> None:
    """Make the file `path`: an empty layer above `beneath`, as large as it. Raises HostError when the disk is full."""
    try:
        path.write_bytes(encode_empty(disk_size(beneath)))
    except OSError as error:
        raise HostError(
            f"create the disk {path}",
            error.strerror or str(error),
            "Free disk space, or check the permissions of the cache directory",
        ) from error


def disk_size(disk: Disk) -> int:
    """Return how many bytes a guest sees of a disk. Raises HostError for a file that is not a disk."""
    if disk.layers:
        return read_header(disk.layers[0]).size_bytes
    assert disk.base is not None, "a disk has layers or a base"
    return disk.base.stat().st_size


def read_header(path: Path) -> Qcow2Header:
    """Return the checked header of a layer. Raises HostError for what no tool may open."""
    try:
        with path.open("rb") as file:
            return parse_header(file.read(MAX_HEAD_BYTES), os.fstat(file.fileno()).st_size)
    except (OSError, Qcow2Error) as error:
        raise HostError(f"read the disk {path}", str(error)) from error


def check_layer(path: Path, file: BinaryIO) -> None:
    """Raise HostError unless all tables of a layer, which is open, are plain and lead into itself."""
    try:
        file.seek(0)
        for _ in _clusters(file):
            pass
    except (OSError, Qcow2Error) as error:
        raise HostError(f"read the disk {path}", str(error)) from error


def flatten(disk: Disk, path: Path) -> None:
    """Write what all layers of `disk` say to the new file `path`: one layer above the same base, which names nothing.

    Raises HostError when a layer is not one, or the host's disk is full.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(layer.open("rb")) for layer in disk.layers]
        found: dict[int, tuple[int, int]] = {}  # cluster: (which file, offset; 0: zeros)
        for number, (layer, file) in enumerate(zip(disk.layers, files, strict=True)):
            try:
                for cluster, offset in _clusters(file):
                    found.setdefault(cluster, (number, offset))  # the topmost counts
            except (OSError, Qcow2Error) as error:
                raise HostError(f"read the disk {layer}", str(error)) from error
        clusters = sorted(found)
        zeros = frozenset(cluster for cluster in clusters if not found[cluster][1])
        pieces = [found[cluster] for cluster in clusters if cluster not in zeros]
        try:
            with path.open("xb") as out:
                out.write(encode_head(disk_size(disk), clusters, zeros))
                out.flush()
                _copy_clusters(files, pieces, out)
        except OSError as error:
            raise HostError(
                f"write the disk {path}", error.strerror or str(error), "Free disk space"
            ) from error


def _clusters(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """The clusters of a layer, which may say anything: (number, offset), offset 0 for zeros. Raises Qcow2Error."""
    size = os.fstat(file.fileno()).st_size
    header = parse_header(file.read(MAX_HEAD_BYTES), size)
    last = -(-header.size_bytes // CLUSTER)
    first = os.pread(file.fileno(), header.l1_entries * 8, header.l1_offset)
    for number, offset in enumerate(decode_tables(first, size)):
        if not offset:
            continue
        for place, data in decode_clusters(os.pread(file.fileno(), CLUSTER, offset), size):
            cluster = number * TABLE_ENTRIES + place
            if cluster < last:
                yield cluster, data


def _copy_clusters(
    files: Sequence[BinaryIO], pieces: Sequence[tuple[int, int]], out: BinaryIO
) -> None:
    """Append the clusters at `pieces`, (which file, offset), to `out`; what lies behind a file's end is zeros."""
    position = out.tell()
    out.truncate(position + len(pieces) * CLUSTER)
    start = 0
    while start < len(pieces):
        number, offset = pieces[start]
        end = start + 1
        while end < len(pieces) and pieces[end] == (number, offset + (end - start) * CLUSTER):
            end += 1
        _copy(files[number], offset, out, position, (end - start) * CLUSTER)
        position += (end - start) * CLUSTER
        start = end


def _copy(source: BinaryIO, offset: int, out: BinaryIO, position: int, length: int) -> None:
    while length:
        copied = copy_extent(source.fileno(), offset, out.fileno(), position, length)
        if not copied:
            return
        offset, position, length = offset + copied, position + copied, length - copied
