"""Lets starts happen a few at a time, first come, first served.

A start is work of the processor's. Fifty at once take longer than one after the other, because emulated processors of a
guest wait for each other in loops while the host runs somebody else's; and all of them end late, not only the last.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

# On two processors without KVM, 50 starts with two at a time had all answered after 8.7 s, half of them after 4.5; with
# all at once after 11.4 and 9.9.
AT_ONCE = max(2, os.cpu_count() or 1)
# Several times what a start takes. A guest that does not come up (a saved one may be hostile) holds up others no
# longer.
LONGEST_TURN_S = 3.0

# A semaphore belongs to one event loop.
_starts: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


@asynccontextmanager
async def turn_to_start() -> AsyncIterator[None]:
    """Wait until it is our turn in this event loop; it ends with the block, or after LONGEST_TURN_S."""
    loop = asyncio.get_running_loop()
    starts = _starts.setdefault(loop, asyncio.Semaphore(AT_ONCE))
    await starts.acquire()
    end = _Once(starts.release)
    timer = loop.call_later(LONGEST_TURN_S, end)
    try:
        yield
    finally:
        timer.cancel()
        end()


class _Once:
    """Calls `act` the first time that it is called."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = act

    def __call__(self) -> None:
        act, self._act = self._act, None
        if act is not None:
            act()
