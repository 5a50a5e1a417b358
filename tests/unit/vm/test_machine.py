"""taskvm.vm.machine: the end of a process, without one."""

import asyncio
import contextlib
from types import SimpleNamespace
from typing import cast

import pytest
from tests.support.waiting import until

from taskvm.vm import machine as machine_module
from taskvm.vm.machine import Machine


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
