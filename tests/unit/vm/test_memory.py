"""Which pages are copied together, and the parts of a file that are no holes.

Covers the parts of taskvm.vm.memory that need no QEMU, and taskvm.vm.extents.
"""

import asyncio
import errno
import gc
import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.waiting import PATIENCE_S

from taskvm.errors import SandboxLostError, SandboxStateError
from taskvm.vm.extents import copy_extent, data_extents
from taskvm.vm.memory import _OWN, MemoryCopy, _refused, join_runs

MIB = 1024 * 1024


@given(st.sets(st.integers(0, 200)), st.integers(0, 10))
def test_joined_runs_hold_all_pages_and_no_gap_that_is_too_small(pages: set[int], gap: int) -> None:
    runs = list(join_runs(((page, page + 1) for page in sorted(pages)), gap))

    assert pages <= {page for first, last in runs for page in range(first, last)}
    assert all(after[0] - before[1] > gap for before, after in pairwise(runs))
    assert all({first, last - 1} <= pages for first, last in runs)


@pytest.mark.parametrize(
    ("entry", "own"),
    [
        (0x00, False),  # never touched
        (0xA0, False),  # the template's page
        (0xA1, False),  # the same, mapped nowhere else
        (0x80, True),  # written
        (0x81, True),
        (0x40, True),  # written, and swapped out
        (0x60, False),
    ],
)
def test_a_page_is_qemus_own_when_it_was_written(entry: int, own: bool) -> None:
    """Bits 63, 62, 61 and 56 of an entry (Documentation/admin-guide/mm/pagemap.rst)."""
    assert (_OWN.fullmatch(bytes([entry])) is not None) == own


def test_a_host_that_lets_nobody_read_is_told_what_to_change() -> None:
    refused = _refused(PermissionError(errno.EPERM, "Operation not permitted"))
    gone = _refused(FileNotFoundError(errno.ENOENT, "No such file or directory"))

    assert isinstance(refused, SandboxStateError)
    assert "kernel.yama.ptrace_scope" in refused.next_step
    assert isinstance(gone, SandboxLostError)


async def test_copiers_end_before_what_they_use_is_closed(tmp_path: Path) -> None:
    """Also when their caller is cancelled again, and when one of them fails meanwhile, which nobody asks for."""
    may_end, left = threading.Event(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))
    copy = object.__new__(MemoryCopy)
    copy._path = tmp_path

    def work() -> None:
        may_end.wait(PATIENCE_S)
        raise SandboxLostError("copy", "QEMU has ended")

    copying = asyncio.get_running_loop().create_task(copy._in_threads(work, work))
    for _ in range(3):
        await asyncio.sleep(0)
        copying.cancel()
    await asyncio.sleep(0)
    ended_first = copying.done()
    may_end.set()
    await asyncio.wait([copying])
    gc.collect()

    assert copying.cancelled()
    assert (ended_first, left) == (False, [])


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "sparse", os.O_RDWR | os.O_CREAT)
    os.truncate(descriptor, 8 * MIB)
    os.pwrite(descriptor, b"a" * MIB, 2 * MIB)
    os.pwrite(descriptor, b"b" * MIB, 6 * MIB)
    yield descriptor
    os.close(descriptor)


def test_the_data_of_a_file_is_found_between_its_holes(sparse: int) -> None:
    found = list(data_extents(sparse))

    assert all(os.pread(sparse, end - start, start).strip(b"ab") == b"" for start, end in found)
    assert sum(end - start for start, end in found) == 2 * MIB


@pytest.mark.parametrize("where", ["the same file system", "another"])
def test_an_extent_is_copied_within_a_file_system_and_across(
    sparse: int, tmp_path: Path, where: str
) -> None:
    directory = tmp_path if where == "the same file system" else Path("/dev/shm")
    path = directory / f"copy-{os.getpid()}"
    out = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    path.unlink()
    try:
        copied = copy_extent(sparse, 2 * MIB, out, MIB, MIB)
        again = copy_extent(sparse, 8 * MIB, out, 2 * MIB, MIB)

        assert (copied, again) == (MIB, 0)
        assert os.pread(out, 4 * MIB, 0) == bytes(MIB) + b"a" * MIB
    finally:
        os.close(out)
