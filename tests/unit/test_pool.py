"""taskvm.pool and copies of a sandbox: of several guests that nobody will have, each is closed."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
from tests.support.waiting import until

from taskvm.checkpoints import forking
from taskvm.checkpoints.carried import Carried
from taskvm.egress.policy import Policy
from taskvm.guest import Guest
from taskvm.options import SandboxOptions
from taskvm.pool import WarmPool
from taskvm.vm.template import Template


class Slow:
    """A guest whose end takes until it is cancelled."""

    def __init__(self) -> None:
        self.closing = False

    async def close(self) -> None:
        self.closing = True
        await asyncio.Event().wait()


async def in_a_pool(guests: list[Slow], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = WarmPool(size=len(guests))
    pool._ready.extend(cast("list[Guest]", guests))
    await pool.__aexit__(None, None, None)


async def as_copies(guests: list[Slow], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug keeps the last copy from starting."""
    left = [*guests]

    async def resume(*_: object) -> Slow:
        if left:
            return left.pop()
        raise RuntimeError

    monkeypatch.setattr(forking, "resume", resume)
    options = SandboxOptions(policy=Policy(), secrets=())
    await forking._start_all(
        cast("Template", None), cast("Carried", None), [options] * (len(guests) + 1)
    )


@pytest.mark.parametrize("held", [in_a_pool, as_copies])
async def test_each_of_several_guests_is_closed_though_the_closing_is_cancelled(
    held: Callable[[list[Slow], pytest.MonkeyPatch], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A virtual machine that nobody has would run until the program ends."""
    guests = [Slow(), Slow(), Slow()]
    closing = asyncio.get_running_loop().create_task(_awaited(held(guests, monkeypatch)))
    for number in range(1, len(guests) + 1):
        await until(lambda number=number: sum(each.closing for each in guests) == number)  # type: ignore[misc]  # bound now
        closing.cancel()
    await asyncio.wait([closing])

    assert closing.cancelled()


async def _awaited(work: Awaitable[None]) -> None:
    await work
