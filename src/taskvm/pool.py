"""QEMU processes started ahead, so that a sandbox costs only what is its own.

    async with WarmPool(size=2) as pool:
        async with Sandbox.create(pool=pool) as vm: ...

A machine in the pool has loaded its state and is paused: it uses no CPU, and the memory of an idle QEMU (tens
of MB). It is
nobody's yet: identity, mounts, policy and secrets come when it is taken.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from taskvm.background import Background
from taskvm.errors import SandboxStateError, UsageError
from taskvm.options import DEFAULT_CPUS, DEFAULT_MEMORY_MIB, ignore_progress
from taskvm.vm.command import Accelerator
from taskvm.vm.machine import Machine
from taskvm.vm.rundir import RunDir
from taskvm.vm.template import Progress, Template
from taskvm.vm.warm import AcceleratorChoice, Wanted, boot_cold, prepare
from taskvm.wanted import find_wanted

MAX_SIZE = 64


@dataclass(frozen=True, slots=True)
class Standby:
    """A machine that is nobody's yet, with the directory it owns."""

    machine: Machine
    run_dir: RunDir
    template: Template | None = None

    @property
    def id(self) -> str:
        """The sandbox's name to be."""
        return self.run_dir.path.name

    async def discard(self) -> None:
        """End the machine and remove its directory."""
        await self.machine.kill()
        self.run_dir.remove()


async def fork(template: Template) -> Standby:
    """Start a machine from `template`, loaded and paused, in a directory of its own."""
    run_dir = _new_run_dir()
    try:
        return Standby(await template.fork(run_dir.path), run_dir, template)
    except BaseException:
        run_dir.remove()
        raise


async def start_cold(wanted: Wanted) -> tuple[Standby, Accelerator]:
    """Start a machine that boots, in a directory of its own; also return what runs it."""
    run_dir = _new_run_dir()
    try:
        machine, accelerator = await boot_cold(wanted, run_dir.path)
    except BaseException:
        run_dir.remove()
        raise
    return Standby(machine, run_dir), accelerator


def _new_run_dir() -> RunDir:
    return RunDir.create(f"sandbox-{secrets.token_hex(6)}")


class WarmPool:
    """Keeps `size` machines of one shape ready. A sandbox of another shape, or one more than are ready, starts
    as without it.

    Raises UsageError for a size below 1 or above MAX_SIZE.
    """

    def __init__(
        self,
        size: int = 1,
        *,
        cpus: int = DEFAULT_CPUS,
        memory_mib: int = DEFAULT_MEMORY_MIB,
        image: str | None = None,
        accel: AcceleratorChoice = "auto",
        on_progress: Progress = ignore_progress,
    ) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise UsageError(f"make a warm pool of {size}", f"its size must be 1 to {MAX_SIZE}")
        self.cpus = cpus
        self.memory_mib = memory_mib
        self.image = image
        self.accel = accel
        self._progress = on_progress
        self._size = size
        self._ready: deque[Standby] = deque()
        self._coming = 0
        self._template: Template | None = None
        self._changed = asyncio.Event()
        self._open = False
        self._failure: BaseException | None = None
        self._background = Background(self._fail)

    async def __aenter__(self) -> Self:
        wanted = await find_wanted(
            image=self.image,
            accel=self.accel,
            cpus=self.cpus,
            memory_mib=self.memory_mib,
            progress=self._progress,
        )
        self._template = await prepare(wanted)
        self._open = True
        self._refill()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        await self._background.aclose()
        while self._ready:
            await self._ready.popleft().discard()

    def take(self, template: Template) -> Standby | None:
        """Hand over a ready machine of `template`, or None; a replacement is started."""
        if not self._open:
            raise SandboxStateError("take a machine from the pool", "it is not open", "Enter it")
        while self._ready and self._template == template:
            standby = self._ready.popleft()
            self._refill()
            if not standby.machine.exited.done():
                return standby
            standby.run_dir.remove()
        return None

    async def wait_full(self) -> None:
        """Wait until all machines are ready. Raises what kept one from starting."""
        while len(self._ready) < self._size:
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()

    def _refill(self) -> None:
        while self._open and len(self._ready) + self._coming < self._size:
            self._coming += 1
            self._background.start(self._add(), "start a machine ahead")

    async def _add(self) -> None:
        assert self._template is not None
        try:
            self._ready.append(await fork(self._template))
        finally:
            self._coming -= 1
            self._changed.set()

    def _fail(self, error: BaseException) -> None:
        # A sandbox that finds the pool empty starts its own machine and meets the same error, where it is told.
        self._failure = error
        self._changed.set()
