"""The memory of a running QEMU, copied into a file: exactly what the guest has, and little of it while it stands still.

A guest's RAM is a private mapping of its template's file, or anonymous. Only the pages that QEMU has written are its
own, and the kernel says which (pagemap.rst): the file begins as a copy of the template's, and these come on top. They
are copied once while the guest runs, so that their blocks are there, and once more, as they are, while it is stopped.

Not QEMU's live migration: before 9.0 it forgets writes of emulated processors (its TLB was not told of pages that
were clean again; "physmem: Fix migration dirty bitmap coherency with TCG memory access"), and 1 of 12 guests that were
saved so on a busy host crashed or hung when it went on.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from taskvm.background import outlast
from taskvm.errors import HostError, SandboxLostError, SandboxStateError
from taskvm.vm.extents import copy_extent, data_extents
from taskvm.vm.machine import Machine
from taskvm.vm.template import reserve_memory

# Where a guest's RAM begins in its own addresses (QEMU: hw/i386/pc.c, hw/arm/virt.c).
RAM_START = {"x86_64": 0, "aarch64": 0x4000_0000}
# Fits a processor's cache: what was read is written before it has left it.
PIECE_BYTES = 1024 * 1024
# Two pieces so close are read as one: what lies between is the template's, or zeros, in QEMU too.
GAP_PAGES = 8
# Reading another process's memory costs as much as writing it: a stopped machine leaves its processors to us.
COPIERS = min(4, os.cpu_count() or 1)
_SAVING = "save the memory of a sandbox"
_ENTRY_BYTES = 8
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20  # the highest byte of an entry of pagemap
_OWN = re.compile(
    b"[%s]+"
    % b"".join(
        b"\\x%02x" % byte
        for byte in range(256)
        if byte & (_PRESENT | _SWAPPED) and not byte & _OF_FILE
    )
)


class MemoryCopy:
    """The new file `path`, which becomes a copy of the memory of `machine`. Make one with `begin`, and close it.

    `start` is where the guest's RAM begins in QEMU's addresses.
    """

    def __init__(self, machine: Machine, path: Path, process: int, start: int) -> None:
        """`process` is QEMU."""
        self._size = machine.shape.memory_mib << 20
        self._base: int | None = None
        self.start = start
        self._stopped = False
        self._path = path
        self._files: list[int] = []
        self._pieces: list[tuple[int, int]] = []
        reserve_memory(path, machine.shape.memory_mib)
        try:
            if machine.memory is not None:  # a number of our own: the machine may end while we read
                self._base = os.dup(machine.memory)
                self._files.append(self._base)
            self._memory = self._open(f"/proc/{process}/mem", os.O_RDONLY)
            self._pages = self._open(f"/proc/{process}/pagemap", os.O_RDONLY)
            self._copy = self._open(path, os.O_RDWR)
        except OSError as error:
            self.close()
            raise _refused(error) from error

    @classmethod
    async def begin(cls, machine: Machine, path: Path) -> MemoryCopy:
        """Make the file and copy what is there by now; the guest runs.

        Raises HostError without room for it, SandboxStateError on a host that forbids it, SandboxLostError.
        """
        process = machine.qemu_pid
        if process is None:
            raise SandboxLostError(_SAVING, "QEMU has ended")
        copy = cls(machine, path, process, await _find_ram(machine))
        try:
            if machine.qemu_pid != process:  # it ended, and another process has its number
                raise SandboxLostError(_SAVING, "QEMU has ended")
            await copy._in_threads(copy._copy_base)
            await copy.update()
        except BaseException:
            copy.close()
            raise
        return copy

    async def update(self) -> None:
        """Copy what QEMU's own pages hold now. Of a stopped guest the file is then its memory. Raises HostError."""
        await self._in_threads(self._find_own)
        shares = [self._pieces[number::COPIERS] for number in range(COPIERS)]
        await self._in_threads(*(partial(self._copy_pieces, share) for share in shares))

    def close(self) -> None:
        """Close what is open. Idempotent."""
        while self._files:
            os.close(self._files.pop())

    # In a thread.

    def _copy_base(self) -> None:
        if self._base is None:
            return
        for start, end in data_extents(self._base):
            offset = start
            while offset < end and not self._stopped:
                copied = copy_extent(self._base, offset, self._copy, offset, end - offset)
                if not copied:
                    return
                offset += copied

    def _copy_pieces(self, pieces: Sequence[tuple[int, int]]) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        for offset, length in pieces:
            if self._stopped:
                return
            if os.preadv(self._memory, [buffer[:length]], self.start + offset) != length:
                raise SandboxLostError(
                    _SAVING, "QEMU has ended, or its memory is not where it says"
                )
            os.pwrite(self._copy, buffer[:length], offset)

    # What is to be copied.

    def _find_own(self) -> None:
        self._pieces = list(self._own_pieces())

    def _own_pieces(self) -> Iterator[tuple[int, int]]:
        """QEMU's own pages, as (offset, length) of at most PIECE_BYTES."""
        for first, last in self._own_pages():
            end = last * mmap.PAGESIZE
            for offset in range(first * mmap.PAGESIZE, end, PIECE_BYTES):
                yield offset, min(PIECE_BYTES, end - offset)

    def _own_pages(self) -> Iterator[tuple[int, int]]:
        """The pages of the guest that QEMU has a copy of its own of, as (first, behind the last)."""
        page = mmap.PAGESIZE
        entries = os.pread(
            self._pages, self._size // page * _ENTRY_BYTES, self.start // page * _ENTRY_BYTES
        )
        if len(entries) != self._size // page * _ENTRY_BYTES:
            raise SandboxLostError(_SAVING, "QEMU has ended, or its memory is not where it says")
        return join_runs(
            (found.span() for found in _OWN.finditer(entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES])),
            GAP_PAGES,
        )

    # Shared.

    def _open(self, path: str | Path, mode: int) -> int:
        descriptor = os.open(path, mode | os.O_CLOEXEC)
        self._files.append(descriptor)
        return descriptor

    async def _in_threads(self, *works: Callable[[], None]) -> None:
        """Run all `works`; whoever is cancelled, and again, waits until they have noticed: they use our descriptors."""
        loop = asyncio.get_running_loop()
        running = [loop.run_in_executor(None, work) for work in works]
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError:
            self._stopped = True
            await outlast(*running)
            raise
        errors = [error for each in running if (error := each.exception()) is not None]
        if not errors:
            return
        try:
            raise errors[0]
        except OSError as error:
            raise HostError(
                f"write the memory of a sandbox to {self._path}",
                error.strerror or str(error),
                "Free disk space, or set TASKVM_CACHE to a directory on a larger disk",
            ) from error


def join_runs(runs: Iterator[tuple[int, int]], gap: int) -> Iterator[tuple[int, int]]:
    """Join the runs (first, behind the last), which are in order, that lie at most `gap` apart.

    >>> list(join_runs(iter([(0, 2), (4, 5), (9, 10)]), 2))
    [(0, 5), (9, 10)]
    """
    pending: tuple[int, int] | None = None
    for first, last in runs:
        if pending is None:
            pending = first, last
        elif first - pending[1] <= gap:
            pending = pending[0], last
        else:
            yield pending
            pending = first, last
    if pending is not None:
        yield pending


async def _find_ram(machine: Machine) -> int:
    """Where the guest's RAM is in QEMU's addresses. A QEMU that lies has other memory of its own saved."""
    answer = await machine.execute(
        "human-monitor-command", **{"command-line": f"gpa2hva {RAM_START[machine.shape.arch]}"}
    )
    found = re.search(r" is 0x([0-9a-f]{1,16})\s*\Z", answer) if isinstance(answer, str) else None
    if found is None:
        raise SandboxLostError("ask QEMU where its guest's memory is", f"it says {answer!r:.200}")
    return int(found.group(1), 16)


def _refused(error: OSError) -> Exception:
    if error.errno not in (errno.EACCES, errno.EPERM):
        return SandboxLostError("read the memory of a sandbox", error.strerror or str(error))
    return SandboxStateError(
        "read the memory of a sandbox",
        "this host lets no process read another's memory, not even that of its own child",
        "Set kernel.yama.ptrace_scope to 0 or 1, or save the disk alone",
    )
