"""taskvm.vm.machine: the end of a process, without one."""

import asyncio
import contextlib
import errno
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from tests.support.waiting import until

from taskvm.errors import HostError
from taskvm.vm import machine as machine_module
from taskvm.vm.command import Boot, Disk, MachineShape
from taskvm.vm.machine import Machine, MachineFiles
from taskvm.vm.qemu import Qemu


async def test_a_kill_that_is_cancelled_can_be_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process that did not end by itself is waited for: how it ended is still to be known."""
    killed: list[bool] = []
    machine = object.__new__(Machine)
    machine._ending = asyncio.Lock()
    machine._lifeline = None
    machine._released = True
    machine.exited = asyncio.get_running_loop().create_future()
    machine._process = cast("None", SimpleNamespace(kill=lambda: killed.append(True)))  # type: ignore[assignment]  # all that is asked of it
    monkeypatch.setattr(machine_module, "END_WAIT_S", 0.0)
    first = asyncio.get_running_loop().create_task(machine.kill())
    await until(lambda: killed)
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    machine.exited.set_result(137)

    assert await machine.kill() == 137


async def test_a_start_that_is_cancelled_at_once_closes_all_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The console's is handed over last."""
    machines: list[Machine] = []
    spawn = machine_module._spawn

    def spawned(qemu: Qemu, shape: MachineShape, files: MachineFiles) -> Machine:
        machines.append(spawn(qemu, shape, files))
        return machines[-1]

    monkeypatch.setattr(machine_module, "_commands", lambda *_: ["sleep", "1000000"])
    monkeypatch.setattr(machine_module, "_spawn", spawned)
    monkeypatch.setattr(machine_module, "END_WAIT_S", 0.0)
    files = MachineFiles(boot=boot(tmp_path), disk=Disk(layers=()))
    starting = asyncio.get_running_loop().create_task(
        Machine.start(cast("Qemu", None), cast("MachineShape", None), files)
    )
    await asyncio.sleep(0)
    (machine,) = machines
    starting.cancel()
    await asyncio.wait([starting])

    assert machine.exited.done()
    assert machine._console_socket.fileno() == -1


def boot(path: Path) -> Boot:
    return Boot(kernel=path, initrd=path, head=path)


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_a_machine_that_cannot_be_started_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has no process left at this moment: the next start may find one."""
    state, memory = tmp_path / "state", tmp_path / "ram"
    state.touch()
    memory.touch()
    files = MachineFiles(boot=boot(memory), disk=Disk(layers=()), memory=memory, state=state)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(machine_module, "_commands", lambda *_: ["qemu"])
    monkeypatch.setattr(subprocess, "Popen", refuse)
    before = open_files()
    with pytest.raises(HostError, match="Resource temporarily unavailable"):
        machine_module._spawn(cast("Qemu", None), cast("MachineShape", None), files)

    assert open_files() == before
