"""taskvm.opening: awaited or entered, begun once, closed only by who entered."""

import pytest

from taskvm.opening import Opening


class Door:
    """Counts what is done with it."""

    def __init__(self) -> None:
        self.opened = self.closed = 0

    async def open(self) -> "Door":
        self.opened += 1
        return self

    async def close(self) -> None:
        self.closed += 1


async def test_awaiting_opens_and_leaves_open() -> None:
    door = Door()

    assert await Opening(door.open) is door
    assert (door.opened, door.closed) == (1, 0)


async def test_entering_opens_and_closes_whatever_happens() -> None:
    door = Door()

    async def enter() -> None:
        async with Opening(door.open) as entered:
            assert entered is door
            raise KeyError

    with pytest.raises(KeyError):
        await enter()
    assert (door.opened, door.closed) == (1, 1)


async def test_nothing_happens_before() -> None:
    door = Door()

    Opening(door.open)

    assert door.opened == 0


async def test_what_does_not_open_is_not_closed() -> None:
    async def fail() -> Door:
        raise KeyError

    with pytest.raises(KeyError):
        async with Opening(fail):
            raise AssertionError("entered")
