"""When the host's disk is full, turns read-only, or loses a file under the guest: the right errno, and no lost data."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.kernel_mount import MNT_DETACH, KernelMount, libc, need_private_mounts
from tests.support.waiting import PATIENCE_S

from taskvm.fs.hostdir import HostDir
from taskvm.fs.provider import Provider

Mount = Callable[[Provider], KernelMount]
MIB = 1 << 20
MS_RDONLY, MS_REMOUNT = 1, 32


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(8):
            file.write(bytes(MIB))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of the host with four megabytes."""
    need_private_mounts()
    path = tmp_path / "small"
    path.mkdir()
    assert not libc.mount(b"none", bytes(path), b"tmpfs", 0, b"size=4m")
    yield path
    libc.umount2(bytes(path), MNT_DETACH)


def test_a_full_disk_is_an_error_of_the_write(kernel_mount: Mount, small: Path) -> None:
    """What was synced before is whole, and there is room again once something is removed."""
    guest = kernel_mount(HostDir(small)).path
    synced = os.urandom(MIB)
    with (guest / "synced").open("wb", buffering=0) as file:
        file.write(synced)
        os.fsync(file.fileno())

    with pytest.raises(OSError, match="No space left"):
        fill(guest / "big")

    assert (small / "synced").read_bytes() == synced
    (guest / "big").unlink()
    (guest / "after").write_bytes(synced)
    assert (small / "after").read_bytes() == synced


def test_a_host_that_turns_read_only_refuses(kernel_mount: Mount, small: Path) -> None:
    """As it would a program of its own."""
    guest = kernel_mount(HostDir(small)).path
    (guest / "file").write_text("before")
    deadline = time.monotonic() + PATIENCE_S  # busy until the server has closed what it wrote to
    while libc.mount(None, bytes(small), None, MS_REMOUNT | MS_RDONLY, None):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    for change in (
        lambda: (guest / "new").touch(),
        lambda: (guest / "file").unlink(),
        lambda: (guest / "file").chmod(0o600),
        lambda: (guest / "file").rename(guest / "other"),
    ):
        with pytest.raises(OSError, match="Read-only"):
            change()

    assert (guest / "file").read_text() == (small / "file").read_text() == "before"


@pytest.mark.parametrize("how", ["removed", "replaced", "moved out"])
def test_a_file_that_the_host_takes_away_is_never_mistaken(
    kernel_mount: Mount, host: Path, how: str
) -> None:
    """What the guest writes into the old file does not appear in the one that has its name now."""
    (host / "file").write_text("old")
    guest = kernel_mount(HostDir(host)).path
    fd = os.open(guest / "file", os.O_RDWR)
    assert os.pread(fd, 10, 0) == b"old"

    if how == "moved out":
        (host / "file").rename(host.parent / "elsewhere")
    else:
        (host / "file").unlink()
    if how == "replaced":
        (host / "file").write_text("new")
    with suppress(OSError):  # ESTALE, or into the file without a name
        os.pwrite(fd, b"written by the guest", 0)
    with suppress(OSError):
        os.close(fd)

    if how == "replaced":
        assert (host / "file").read_text() == "new"
    else:
        assert not (host / "file").exists()
        deadline = time.monotonic() + PATIENCE_S
        while (guest / "file").exists():
            assert time.monotonic() < deadline


_MAP = """
import errno, mmap, os, sys
with open(sys.argv[1], "w+b", buffering=0) as file:
    file.truncate(8 << 20)
    with mmap.mmap(file.fileno(), 8 << 20) as mapping:
        mapping[:] = os.urandom(8 << 20)
        for call in (mapping.flush, lambda: os.fsync(file.fileno())):
            try:
                call()
            except OSError as error:
                print(errno.errorcode[error.errno])
"""


def test_a_full_disk_is_an_error_of_the_sync_of_a_mapping(kernel_mount: Mount, small: Path) -> None:
    """Who wrote to memory hears it from msync(2) or fsync(2), also when a part of it found room."""
    guest = kernel_mount(HostDir(small)).path

    # A process of its own: a page fault keeps Python's lock, which the server needs to answer it.
    program = [sys.executable, "-I", "-c", _MAP, str(guest / "file")]
    told = subprocess.run(
        program, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    ).stdout

    assert set(told.split()) & {"ENOSPC", "EIO"}
