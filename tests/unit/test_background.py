"""Tasks with an owner (taskvm.background)."""

import asyncio

import pytest

from taskvm.background import Background, finished


async def test_a_failure_is_told_once_and_a_cancellation_is_none() -> None:
    """An exception reaches `on_failure`; closing cancels what still runs, silently."""
    failures: list[BaseException] = []
    background = Background(failures.append)
    ended = asyncio.Event()

    async def breaks() -> None:
        raise ValueError("broken")

    async def lasts() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    background.start(breaks(), "breaks")
    background.start(lasts(), "lasts")
    await asyncio.sleep(0.01)
    await background.aclose()
    await background.aclose()

    assert [str(failure) for failure in failures] == ["broken"]
    assert ended.is_set()


async def test_a_task_that_is_ending_is_not_interrupted_by_another_close() -> None:
    """A close that was cancelled is done again: what its tasks release is released."""
    cancelled, may_end, released = asyncio.Event(), asyncio.Event(), []

    async def lasts() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
            await may_end.wait()
            released.append("all")

    background = Background(released.append)
    background.start(lasts(), "lasts")
    await asyncio.sleep(0)
    first = asyncio.get_running_loop().create_task(background.aclose())
    await cancelled.wait()
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.get_running_loop().create_task(background.aclose())
    await asyncio.sleep(0)
    may_end.set()
    await second

    assert released == ["all"]


async def test_work_that_must_not_be_left_halfway_ends_before_its_cancelled_caller() -> None:
    """It is told to hurry, is not cancelled, also when its caller is cancelled again, and what it raises is dropped."""
    began, may_end, told = asyncio.Event(), asyncio.Event(), []

    async def work() -> None:
        began.set()
        await may_end.wait()
        told.append("done")
        raise ValueError("too late to be told")

    async with asyncio.TaskGroup() as group:
        caller = group.create_task(finished(work(), hurry=lambda: told.append("hurry")))
        await began.wait()
        for _ in range(3):
            caller.cancel()
            await asyncio.sleep(0)
        assert (told, caller.done()) == (["hurry"], False)
        may_end.set()

    assert told == ["hurry", "done"]
    assert caller.cancelled()


async def test_the_result_of_finished_work_is_its_own() -> None:
    async def work(fails: bool) -> str:
        if fails:
            raise ValueError("broken")
        return "done"

    assert await finished(work(False)) == "done"
    with pytest.raises(ValueError, match="broken"):
        await finished(work(True))
