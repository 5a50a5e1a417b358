"""Waiting for what must happen: for the condition, never for a time, and with one generous limit.

A test that meets the limit has found a hang. It is far above what anything takes on a machine that is busy with twenty
other programs, and below the runner's own limit for a test, so that the test can say what did not happen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

PATIENCE_S = 100.0
POLL_S = 0.02


def wait_until(true: Callable[[], object]) -> None:
    """Return when it is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"it did not happen within {PATIENCE_S:.0f} s"
        time.sleep(POLL_S)


def eventually(true: Callable[[], object]) -> bool:
    """Wait until it is true; tell whether it came to be. A look that fails, at what just changed, says nothing."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(OSError):
            if true():
                return True
        time.sleep(POLL_S)
    return False


async def until(true: Callable[[], object]) -> None:
    """Return when it is true; tasks run meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"it did not happen within {PATIENCE_S:.0f} s"
        await asyncio.sleep(POLL_S)


def growing(first_s: float) -> Iterator[float]:
    """Yield spans of time, each four times the last, up to PATIENCE_S.

    For a limit within which something has to happen first: how long that takes is the machine's to say.
    """
    span_s = first_s
    while span_s < PATIENCE_S:
        yield span_s
        span_s *= 4


async def until_settled(value: Callable[[], int], for_s: float = 0.5) -> int:
    """Return the value when it has moved from 0 and then stood still for a while."""
    deadline, last, since = time.monotonic() + PATIENCE_S, 0, time.monotonic()
    while not last or time.monotonic() - since < for_s:
        assert time.monotonic() < deadline, f"{last} went on changing"
        await asyncio.sleep(POLL_S)
        if (now := value()) != last:
            last, since = now, time.monotonic()
    return last
