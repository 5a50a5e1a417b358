"""A running machine's disk, or its memory and disk, as they are at one instant; the machine runs on.

Memory is moved, while the machine runs, into a second QEMU that never runs: its RAM is a new file. When little is
left the guest is brought to rest, the machine stops before its devices are sent, its disk is cut at that moment, and
it goes on; the second QEMU then saves its device state like a template's and ends (migration.rst, "pre-switchover").

What is at rest is the caller's: `at_rest` is entered as late as possible, since programs stand still inside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from qemu.qmp import EventListener

from taskvm.errors import SandboxLostError
from taskvm.vm.command import Disk
from taskvm.vm.disk import disk_size
from taskvm.vm.layers import Layers
from taskvm.vm.machine import QMP_TIMEOUT_S, Machine, MachineFiles
from taskvm.vm.qemu import Qemu
from taskvm.vm.template import reserve_memory

AtRest = Callable[[], AbstractAsyncContextManager[None]]

# The guest comes to rest when so much is left to send, about 50 ms of it: later, and the machine could stop first.
REST_BYTES = 24 * 1024 * 1024
# A guest that dirties its memory faster than it is sent: rest all the same, and send the remainder then.
REST_AFTER_S = 5.0
POLL_S = 0.005
# Never what slows it; QEMU's own default is 128 MiB/s.
BANDWIDTH = 16 * 1024**3
# How much may be left when the machine stops, as time at the speed that QEMU has seen.
DOWNTIME_MS = 10


@dataclass(frozen=True, slots=True)
class Cut:
    """What was saved: the disk, whose top layer never changes again, and for how long the machine was stopped."""

    disk: Disk
    stopped_s: float


async def save_disk(machine: Machine, layers: Layers, at_rest: AtRest) -> Cut:
    """Cut the disk of a running machine. Raises SandboxLostError, SandboxStateError."""
    await layers.prepare()
    async with at_rest():
        stopped_s = time.monotonic()
        await machine.execute("stop")
        try:
            disk = await layers.cut()
        finally:
            await machine.execute("cont")
        return Cut(disk, time.monotonic() - stopped_s)


async def save_machine(
    qemu: Qemu, machine: Machine, layers: Layers, at_rest: AtRest, directory: Path
) -> Cut:
    """Save the memory of a running machine as `ram` and `state` in `directory`, and cut its disk at that instant.

    Raises SandboxLostError, SandboxStateError, HostError.
    """
    await layers.prepare()
    try:
        return await _save(qemu, machine, layers, at_rest, directory, REST_BYTES)
    except _TooLateError:
        for name in ("ram", "state"):
            (directory / name).unlink(missing_ok=True)
        return await _save(qemu, machine, layers, at_rest, directory, sys.maxsize)


class _TooLateError(Exception):
    """Raised when the machine stopped before its guest was at rest: there was less left to send than it seemed."""


async def _save(
    qemu: Qemu, machine: Machine, layers: Layers, at_rest: AtRest, directory: Path, rest_bytes: int
) -> Cut:
    receiver = await _start_receiver(qemu, machine, directory / "ram")
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs, receiver.listen("MIGRATION") as arrived:
            await receiver.set_capabilities()
            await receiver.give("getfd", theirs.fileno(), fdname="peer")
            await receiver.execute("migrate-incoming", uri="fd:peer")
            cut = await _send(machine, layers, at_rest, ours, rest_bytes)
            await receiver.wait_migration(arrived, "completed", "receive a machine's memory")
        await receiver.save_state(directory / "state")
        await receiver.execute("quit")
        await asyncio.wait([receiver.exited], timeout=10)
        return cut
    finally:
        await receiver.kill()


async def _start_receiver(qemu: Qemu, machine: Machine, memory: Path) -> Machine:
    reserve_memory(memory, machine.shape.memory_mib)
    files = MachineFiles(
        boot=machine.files.boot,
        disk=Disk(size_bytes=disk_size(machine.files.disk)),
        memory=memory,
        share_memory=True,
        receiving=True,
    )
    return await Machine.start(qemu, machine.shape, files)


async def _send(
    machine: Machine, layers: Layers, at_rest: AtRest, peer: socket.socket, rest_bytes: int
) -> Cut:
    with machine.listen("MIGRATION") as events:
        await machine.set_capabilities("pause-before-switchover")
        await machine.execute(
            "migrate-set-parameters",
            **{"max-bandwidth": BANDWIDTH, "downtime-limit": DOWNTIME_MS},
        )
        await machine.give("getfd", peer.fileno(), fdname="peer")
        await machine.execute("migrate", uri="fd:peer")
        try:
            await _wait_nearly_sent(machine, rest_bytes)
            async with _rested(machine, events, at_rest):
                stopped_s = time.monotonic()
                disk = await layers.cut()
                await machine.execute("migrate-continue", state="pre-switchover")
                await machine.wait_migration(events, "completed", "send a machine's memory")
                await _run_on(machine)
                return Cut(disk, time.monotonic() - stopped_s)
        except BaseException:
            with contextlib.suppress(SandboxLostError):
                await machine.execute("migrate_cancel")
                await _run_on(machine)
            raise


async def _run_on(machine: Machine) -> None:
    """Let the machine go on, as soon as QEMU allows it: it says "completed" a moment before."""
    async with asyncio.timeout(QMP_TIMEOUT_S):
        while True:
            status = await machine.execute("query-status")
            if _field(status, "status") != "finish-migrate":
                break
            await asyncio.sleep(POLL_S / 5)
    await machine.execute("cont")


async def _wait_nearly_sent(machine: Machine, rest_bytes: int) -> None:
    began_s = time.monotonic()
    while time.monotonic() - began_s < REST_AFTER_S:
        remaining = _field(_field(await machine.execute("query-migrate"), "ram"), "remaining")
        if isinstance(remaining, int) and remaining <= rest_bytes:
            return
        await asyncio.sleep(POLL_S)


def _field(answer: object, name: str) -> object:
    return answer.get(name) if isinstance(answer, dict) else None


@asynccontextmanager
async def _rested(machine: Machine, events: EventListener, at_rest: AtRest) -> AsyncIterator[None]:
    """Bring the guest to rest, then wait until the machine has stopped. Raises _TooLateError."""
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.TaskGroup() as group:
                stopping = group.create_task(
                    machine.wait_migration(events, "pre-switchover", "stop a machine")
                )
                resting = group.create_task(stack.enter_async_context(at_rest()))
                await asyncio.wait([stopping, resting], return_when=asyncio.FIRST_COMPLETED)
                too_late = stopping.done() and not resting.done()
                if too_late:  # it must run to come to rest
                    await machine.execute("migrate_cancel")
                    await _run_on(machine)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        if too_late:
            raise _TooLateError
        yield
