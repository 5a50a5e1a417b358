"""taskvm.turns: a few at a time, in the order of their coming, and nobody is held up for long."""

import asyncio

import pytest

from taskvm import turns
from taskvm.turns import AT_ONCE, turn_to_start


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No turn ends because this host is slow."""
    monkeypatch.setattr(turns, "LONGEST_TURN_S", 1000.0)


async def test_a_few_start_at_once_in_the_order_of_their_coming() -> None:
    under_way: set[int] = set()
    most = 0
    begun: list[int] = []

    async def start(number: int) -> None:
        nonlocal most
        async with turn_to_start():
            begun.append(number)
            under_way.add(number)
            most = max(most, len(under_way))
            await asyncio.sleep(0)
            under_way.remove(number)

    await asyncio.gather(*(start(number) for number in range(5 * AT_ONCE)))

    assert most == AT_ONCE
    assert begun == list(range(5 * AT_ONCE))


async def test_starts_that_hang_give_their_turns_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may start hang; the next ones start nevertheless, and never more at once for it later."""
    monkeypatch.setattr(turns, "LONGEST_TURN_S", 0.01)
    release = asyncio.Event()

    async def hang() -> None:
        async with turn_to_start():
            await release.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(hang())
        await asyncio.sleep(0)
        async with turn_to_start():
            release.set()
    monkeypatch.setattr(turns, "LONGEST_TURN_S", 1000.0)
    await test_a_few_start_at_once_in_the_order_of_their_coming()


async def test_a_start_that_fails_or_is_cancelled_gives_its_turn_back() -> None:
    for _ in range(2 * AT_ONCE):
        with pytest.raises(RuntimeError):
            async with turn_to_start():
                raise RuntimeError
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0), turn_to_start():
                await asyncio.Event().wait()

    await test_a_few_start_at_once_in_the_order_of_their_coming()


def test_each_event_loop_has_turns_of_its_own() -> None:
    """A semaphore that somebody has waited for in one loop fails in another."""
    for _ in range(2):
        asyncio.run(test_a_few_start_at_once_in_the_order_of_their_coming())
