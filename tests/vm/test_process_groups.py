"""Many commands at once, and what finished ones leave behind (taskvm.process)."""

import asyncio
import contextlib

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm import Process, Sandbox

pytestmark = pytest.mark.vm
BOTH_SURFACES = True


async def count(vm: Sandbox, pattern: str) -> int:
    """How many processes of the guest have a command line like `pattern`."""
    return int((await vm.exec(["pgrep", "-fc", pattern])).stdout)


async def wait_for_count(vm: Sandbox, pattern: str, expected: int) -> None:
    """Wait until there are so many. One that is about to become another program has no command line for a moment."""
    async with asyncio.timeout(PATIENCE_S):
        while await count(vm, pattern) != expected:
            await asyncio.sleep(0.05)


async def wait_until_gone(vm: Sandbox, pattern: str) -> None:
    await wait_for_count(vm, pattern, 0)


async def finished(vm: Sandbox, command: str) -> Process:
    """A command that has ended."""
    process = await vm.spawn(command)
    await process.wait()
    return process


async def test_sixty_four_commands_at_once_keep_their_outputs_apart(vm: Sandbox) -> None:
    """Both streams of each hold its own bytes only, and all run at the same time: each waits for the last."""
    command = (
        "mkdir -p /tmp/here && touch /tmp/here/$1 && "
        "until [ $(ls /tmp/here | wc -l) = 64 ]; do sleep 0.5; done; "
        "for i in $(seq 200); do echo $1; echo error $1 >&2; done"
    )
    results = await asyncio.gather(
        *(vm.exec(["sh", "-c", command, "sh", str(number)]) for number in range(64))
    )

    assert [result.stdout for result in results] == [f"{number}\n" * 200 for number in range(64)]
    assert [result.stderr for result in results] == [
        f"error {number}\n" * 200 for number in range(64)
    ]


async def test_what_a_finished_command_left_is_killed_on_demand(vm: Sandbox) -> None:
    """kill_all after the exit ends double-forked children, and those of no other command."""
    mine = await finished(vm, "setsid sleep 1111 >/dev/null 2>&1 & sleep 1112 & true")
    other = await finished(vm, "setsid sleep 2222 >/dev/null 2>&1 & true")
    await wait_for_count(vm, "sleep (111|2222)", 3)

    await mine.kill_all()
    await wait_until_gone(vm, "sleep 111")
    spared = await count(vm, "sleep 2222")
    await other.kill_all()
    await wait_until_gone(vm, "sleep 2222")

    assert spared == 1


async def test_leaving_the_block_ends_what_a_finished_command_left(vm: Sandbox) -> None:
    """`async with` holds for children too."""
    async with await vm.spawn("setsid sleep 3333 >/dev/null 2>&1 & true") as process:
        await process.wait()
        await wait_for_count(vm, "sleep 3333", 1)

    await wait_until_gone(vm, "sleep 3333")


async def test_leaving_the_block_by_an_exception_ends_what_a_finished_command_left(
    vm: Sandbox,
) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with await vm.spawn("setsid sleep 4444 >/dev/null 2>&1 & true") as process:
            await process.wait()
            await wait_for_count(vm, "sleep 4444", 1)
            raise ZeroDivisionError

    await wait_until_gone(vm, "sleep 4444")


async def test_an_exec_that_ended_leaves_its_children_alone(vm: Sandbox) -> None:
    result = await vm.exec("setsid sleep 5555 >/dev/null 2>&1 & true")

    assert result.ok
    await wait_for_count(vm, "sleep 5555", 1)


async def test_killing_what_is_gone_is_no_error() -> None:
    """Neither when nothing is left, nor when the sandbox is closed."""
    async with Sandbox.create(cpus=1, memory_mib=256) as vm:
        process = await finished(vm, "true")
        await process.kill_all()

    await process.kill_all()
