"""A running machine's disk, or its memory and disk, as they are at one instant; the machine runs on.

Most of the memory is copied while it runs (vm/memory.py). Then it comes to rest and stops; its devices are written
down, what has changed is copied, its disk is cut, and it goes on.

What is at rest is the caller's: `at_rest` is entered as late as possible, since programs stand still inside it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

from taskvm.vm.command import Disk
from taskvm.vm.layers import Layers
from taskvm.vm.machine import Machine
from taskvm.vm.memory import MemoryCopy

AtRest = Callable[[], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Cut:
    """What was saved: the disk, whose top layer never changes again, and for how long the machine was stopped."""

    disk: Disk
    stopped_s: float


async def save_disk(machine: Machine, layers: Layers, at_rest: AtRest) -> Cut:
    """Cut the disk of a running machine. Raises SandboxLostError, SandboxStateError."""
    await layers.prepare()
    async with at_rest():
        began_s = time.monotonic()
        async with _stopped(machine):
            disk = await layers.cut()
        return Cut(disk, time.monotonic() - began_s)


async def save_machine(machine: Machine, layers: Layers, at_rest: AtRest, directory: Path) -> Cut:
    """Save the memory of a running machine as `ram` and `state` in `directory`, and cut its disk at that instant.

    Raises SandboxLostError, SandboxStateError, HostError.
    """
    await layers.prepare()
    with closing(await MemoryCopy.begin(machine, directory / "ram")) as memory:
        async with at_rest():
            began_s = time.monotonic()
            async with _stopped(machine):
                await machine.save_state(directory / "state")
                await memory.update()
                disk = await layers.cut()  # last: what fails before leaves the disk as it is
            return Cut(disk, time.monotonic() - began_s)


@asynccontextmanager
async def _stopped(machine: Machine) -> AsyncIterator[None]:
    try:
        await machine.execute("stop")
        yield
    finally:
        await machine.execute("cont")
