"""Tasks with an owner (taskvm.background)."""

import asyncio

from taskvm.background import Background


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
