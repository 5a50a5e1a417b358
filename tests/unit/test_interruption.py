"""taskvm.interruption: what blocks in a thread ends when nobody waits for it any more."""

import asyncio
import fcntl
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.waiting import PATIENCE_S, until

from taskvm.image.build import BuiltAssets
from taskvm.image.debian import _run_mmdebstrap
from taskvm.image.manifest import ImageSpec
from taskvm.image.store import ImageStore, Progress
from taskvm.image.tools import run_tool
from taskvm.interruption import check, in_thread

SPEC = ImageSpec(arch="x86_64")
FOREVER = ["sleep", "1000000"]


async def test_the_result_and_the_error_of_the_work_are_those_of_the_call() -> None:
    """What is not cancelled never learns of it."""
    check()

    assert await in_thread(lambda: check() or "done") == "done"
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)


async def test_the_end_of_the_work_is_waited_for_however_often_it_is_cancelled() -> None:
    """A caller closes the descriptor that the work writes to: its number may be another file's then."""
    may_end, left = threading.Event(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))

    def work() -> None:
        may_end.wait(PATIENCE_S)
        raise ValueError("too late to be told")

    caller = asyncio.get_running_loop().create_task(in_thread(work))
    for _ in range(3):
        await asyncio.sleep(0)
        caller.cancel()
    await asyncio.sleep(0)
    ended_first = caller.done()
    may_end.set()
    await asyncio.wait([caller])
    gc.collect()

    assert caller.cancelled()
    assert (ended_first, left) == (False, [])


def in_a_program(_: ImageSpec, target: Path, progress: Progress) -> BuiltAssets:
    progress("runs")
    run_tool("wait", FOREVER)
    raise AssertionError


def in_mmdebstrap(_: ImageSpec, target: Path, progress: Progress) -> BuiltAssets:
    progress("runs")
    _run_mmdebstrap(["sh", "-c", "exec sleep 1000000"], {}, b"", target, progress)
    raise AssertionError


@pytest.mark.parametrize("build", [in_a_program, in_mmdebstrap])
async def test_an_image_build_that_is_cancelled_ends_with_its_programs(
    tmp_path: Path, build: Callable[[ImageSpec, Path, Progress], BuiltAssets]
) -> None:
    """Nothing half made stays, and the lock is free."""
    store = ImageStore(tmp_path, builder=build)
    lines: list[str] = []
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        building = group.create_task(in_thread(store.ensure, SPEC, lines.append))
        await until(lambda: lines)
        building.cancel()

    assert building.cancelled()
    assert not (tmp_path / "staging").exists()
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_one_that_waits_for_another_process_to_build_can_be_cancelled(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, builder=in_a_program)
    lines: list[str] = []
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            building = group.create_task(in_thread(store.ensure, SPEC, lines.append))
            await until(lambda: lines)
            building.cancel()

    assert building.cancelled()
    assert "another process is building" in lines[0]
