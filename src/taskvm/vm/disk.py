"""Disks as files: empty layers, and the one file that says what several layers say.

Every format is named, none is ever guessed from a file's content. A layer's bytes come from a guest, and from a QEMU
that a guest may have taken over: no tool of the host's opens it, and what is made of it is written by us alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
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
    require,
)

# 64 GiB of a disk from elsewhere; of ours only what its base has can be zeros.
MAX_ZEROS = 1 << 20
# Clusters that are copied at once, 64 MiB: so soon it is noticed that nobody waits any more.
MAX_RUN = 1024


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


def flatten(
    disk: Disk, path: Path, *, spare_bytes: int = 0, stop: Callable[[], bool] = lambda: False
) -> None:
    """Write what all layers of `disk` say to the new file `path`: one layer above the same base, which names nothing.

    It ends early, with half a file, when `stop` says so. Raises HostError when a layer is not one, or the host's disk
    is full or would have less than `spare_bytes` free then.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(layer.open("rb")) for layer in disk.layers]
        found = _find_clusters(disk, files)
        clusters = sorted(found)
        zeros = frozenset(cluster for cluster in clusters if not found[cluster][1])
        pieces = [found[cluster] for cluster in clusters if cluster not in zeros]
        try:
            check_room(path, len(pieces) * CLUSTER, spare_bytes)
            with path.open("xb") as out:
                out.write(encode_head(disk_size(disk), clusters, zeros))
                out.flush()
                _copy_clusters(files, pieces, out, stop)
        except OSError as error:
            raise HostError(
                f"write the disk {path}", error.strerror or str(error), "Free disk space"
            ) from error


def check_room(path: Path, needed: int, spare: int) -> None:
    """Raise HostError when `needed` bytes more for `path` leave less than `spare`: sandboxes would be ended then."""
    free = shutil.disk_usage(path.parent).free
    if free < needed + spare:
        raise HostError(
            f"write {path}",
            f"it takes {needed >> 20} MiB, {free >> 20} MiB are free, and {spare >> 20} MiB must remain",
            "Free disk space, or choose a larger disk",
        )


def _find_clusters(disk: Disk, files: Sequence[BinaryIO]) -> dict[int, tuple[int, int]]:
    """Where each cluster of `disk` is that its base does not have: (which file, offset), offset 0 for zeros."""
    # Behind the end of the base there are zeros anyway, and a guest's `fstrim` says so of each cluster.
    behind = None if disk.base is None else -(-disk.base.stat().st_size // CLUSTER)
    zeros = 0
    found: dict[int, tuple[int, int]] = {}
    for number in reversed(range(len(files))):  # from the lowest up: the topmost counts
        try:
            for cluster, offset in _clusters(files[number]):
                if offset or behind is None or cluster < behind:
                    found[cluster] = (number, offset)
                else:
                    found.pop(cluster, None)
                if not offset and behind is None:
                    zeros += 1
                    require(zeros <= MAX_ZEROS, "more of it is zeros than a saved disk has")
        except (OSError, Qcow2Error) as error:
            raise HostError(f"read the disk {disk.layers[number]}", str(error)) from error
    return found


def _clusters(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """The clusters of a layer, which may say anything: (number, offset), offset 0 for zeros. Raises Qcow2Error.

    There are no more than its file has room for, and as many of zeros as its tables.
    """
    size = os.fstat(file.fileno()).st_size
    header = parse_header(file.read(MAX_HEAD_BYTES), size)
    last = -(-header.size_bytes // CLUSTER)
    seen: set[int] = set()
    for number, offset in enumerate(
        decode_tables(_read(file, header.l1_offset, header.l1_entries * 8), size)
    ):
        if not offset:
            continue
        _see(seen, offset)
        for place, data in decode_clusters(_read(file, offset, CLUSTER), size):
            if data:
                _see(seen, data)
            cluster = number * TABLE_ENTRIES + place
            if cluster < last:
                yield cluster, data


def _see(seen: set[int], offset: int) -> None:
    """Two that share a place are a small file that becomes terabytes."""
    require(offset not in seen, "two clusters of it lie in the same place")
    seen.add(offset)


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    data = os.pread(file.fileno(), length, offset)
    require(len(data) == length, "it ends within a table")
    return data


def _copy_clusters(
    files: Sequence[BinaryIO],
    pieces: Sequence[tuple[int, int]],
    out: BinaryIO,
    stop: Callable[[], bool],
) -> None:
    """Append the clusters at `pieces`, (which file, offset), to `out`; what lies behind a file's end is zeros."""
    position = out.tell()
    out.truncate(position + len(pieces) * CLUSTER)
    start = 0
    while start < len(pieces) and not stop():
        number, offset = pieces[start]
        end = start + 1
        most = min(len(pieces), start + MAX_RUN)
        while end < most and pieces[end] == (number, offset + (end - start) * CLUSTER):
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
