"""A file system of the host that is small, or full."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MIB = 1024 * 1024


@contextlib.contextmanager
def small_disk(place: Path, size_mib: int) -> Iterator[Path]:
    """Mount a file system of that size on a new directory."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=700", "none", place]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("this user may not mount a small file system to fill")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(directory: Path) -> Path:
    """Take all the room that is left, and return the file that has it."""
    filler = directory / "filler"
    with filler.open("ab", buffering=0) as stream:
        for size in (MIB, 4096):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(stream.fileno(), stream.seek(0, os.SEEK_END), size)
    return filler
