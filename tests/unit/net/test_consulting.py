"""Calling a user's function (taskvm.net.consulting, taskvm.net.hooked, taskvm.net.keyring): plain or not."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm.egress.oversight import Oversight
from taskvm.errors import UsageError
from taskvm.net.consulting import Consulting
from taskvm.net.hooked import both


async def test_a_plain_function_runs_in_a_thread_and_a_coroutine_function_here() -> None:
    async def here(number: int) -> tuple[int, int]:
        return number, threading.get_ident()

    def there(number: int) -> tuple[int, int]:
        return number, threading.get_ident()

    consulting = Consulting()
    assert await consulting.call(here, 1) == (1, threading.get_ident())
    number, thread = await consulting.call(there, 2)
    assert number == 2
    assert thread != threading.get_ident()
    assert (await consulting.call(lambda: here(3)))[0] == 3
    consulting.close()


async def test_what_blocks_takes_no_thread_of_anybody_elses() -> None:
    """A function outlives its deadline: the loop's own threads, which everything shares, stay free."""
    go_on = threading.Event()
    consulting, other = Consulting(max_threads=2), Consulting()
    for _ in range(20):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await consulting.call(go_on.wait, PATIENCE_S)

    assert await asyncio.to_thread(lambda: 1) == 1
    assert await other.call(lambda: 2) == 2
    consulting.close()  # and waits for nothing
    go_on.set()
    other.close()


class Marks:
    def __init__(self, mark: bytes) -> None:
        self._mark = mark

    def feed(self, data: bytes) -> bytes:
        return data + self._mark

    def finish(self) -> bytes:
        return b"." + self._mark


def test_two_filters_are_one_after_the_other() -> None:
    filters = both(Marks(b"1"), Marks(b"2"))
    assert filters is not None

    assert filters.feed(b"a") + filters.finish() == b"a12" + b".12" + b".2"
    assert both(None, None) is None


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_deadline_is_more_than_nothing(seconds: float) -> None:
    with pytest.raises(UsageError, match="approver"):
        Oversight(deadline_s=seconds)
