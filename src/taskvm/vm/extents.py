"""The parts of a file that hold data, and how they are copied: by the file system, if it can, without reading them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

# One call copies at most so much, so that whoever waits for its end does not wait long.
STEP_BYTES = 64 * 1024 * 1024


def data_extents(file: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are no holes, as (offset, end). A file system without holes has one part."""
    end = 0
    while True:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end


def copy_extent(source: int, offset: int, out: int, position: int, length: int) -> int:
    """Copy at most `length` bytes and return how many; 0 at the end of `source`.

    copy_file_range(2) shares blocks where the file system can, and refuses to cross file systems (EXDEV).
    """
    length = min(length, STEP_BYTES)
    try:
        return os.copy_file_range(source, out, length, offset, position)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    os.lseek(out, position, os.SEEK_SET)
    return os.sendfile(out, source, offset, length)
