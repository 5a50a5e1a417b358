"""taskvm.supervisor.holding sees each use of a sandbox, also one that is over before it looks."""

import asyncio
import errno
from types import SimpleNamespace
from typing import cast

import pytest
from tests.support.waiting import until

from taskvm.errors import GuestError, SandboxLostError, UsageError
from taskvm.opening import Opening
from taskvm.sandbox import Sandbox
from taskvm.supervisor.holding import MAX_ENDED, MAX_RUNNING, Holding, Recipe
from taskvm.supervisor.job import Job
from taskvm.wire.supervision import Launch


class Groups:
    """The guest's control groups of commands: those with an odd number still hold something."""

    async def stat(self, path: str) -> None:
        if int(path.removeprefix("/sys/fs/cgroup/exec/")) % 2 == 0:
            raise GuestError(f"stat {path}", errno.ENOENT, "openat")


class Watched:
    """What a look reads of a guest."""

    def __init__(self) -> None:
        self.movement = (3, 10)


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
async def holding(watched: Watched) -> Holding:
    guest = SimpleNamespace(
        machine=SimpleNamespace(qemu_pid=None),
        gateway=SimpleNamespace(connections=0),
        watch=watched,
    )
    vm = cast("Sandbox", SimpleNamespace(id="sandbox-test", _guest=guest, files=Groups()))
    return Holding(vm, Recipe(starting=cast("Opening[Sandbox]", None)), "test")


async def test_a_request_counts_although_it_is_over(holding: Holding) -> None:
    """As does anything that was done in between, since looks come once a second."""
    before = holding._look()
    with holding.busy():
        during = holding._look()
    after = holding._look()

    assert (before.busy, during.busy, after.busy) == (False, True, False)
    assert before.moved < during.moved == after.moved


@pytest.mark.parametrize("moved", [(4, 10), (3, 11)])
async def test_calls_and_frames_of_the_guest_count(
    holding: Holding, watched: Watched, moved: tuple[int, int]
) -> None:
    """A silent command, and a short request to a published port."""
    before = holding._look()
    watched.movement = moved

    assert holding._look().moved > before.moved


async def test_commands_that_begin_at_the_same_time_are_not_too_many(holding: Holding) -> None:
    """None of them runs yet when the next one is asked for."""
    may_start = asyncio.Event()

    async def spawn(_command: object, **_: object) -> None:
        await may_start.wait()
        raise SandboxLostError("start a command", "this test starts none")

    holding.vm.spawn = spawn  # type: ignore[method-assign,assignment]  # all that a launch uses
    launches = [holding.launch(Launch(command=["true"])) for _ in range(MAX_RUNNING + 1)]
    beginning = asyncio.gather(*launches, return_exceptions=True)
    await asyncio.sleep(0)
    may_start.set()
    outcomes = [type(each) for each in await beginning]

    assert outcomes == [SandboxLostError] * MAX_RUNNING + [UsageError]


async def test_of_a_command_that_is_forgotten_the_handle_stays_while_something_of_it_runs(
    holding: Holding,
) -> None:
    """And it takes no use along."""
    for number in range(MAX_ENDED + 4):
        job = SimpleNamespace(number=number, moved=7, attached=0, running=False, process=None)
        holding.jobs[number] = cast("Job", job)
    before = holding._look()
    holding._forget_old()

    assert list(holding.jobs) == list(range(4, MAX_ENDED + 4))
    assert holding._look().moved == before.moved
    await until(lambda: list(holding._left) == [1, 3])
