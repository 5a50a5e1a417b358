"""Blocking work in a thread that ends soon after the task that waits for it is cancelled.

`asyncio.to_thread` leaves the thread running, and a program's end then waits for it: minutes for an image. Here the
work is told. It asks, at every place where it waits, by `check`, and undoes what it began as for any other error.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from taskvm.background import outlast

_P = ParamSpec("_P")
_T = TypeVar("_T")
# How often work that waits for something else, such as a program or a lock, asks.
CHECK_INTERVAL_S = 0.1
_told: contextvars.ContextVar[threading.Event] = contextvars.ContextVar("_told")


class InterruptedWorkError(Exception):
    """Raised by `check` in work that nobody waits for any more."""


def check() -> None:
    """Raise InterruptedWorkError when the task that waits for this thread was cancelled."""
    told = _told.get(None)
    if told is not None and told.is_set():
        raise InterruptedWorkError


async def in_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run `function` in a thread and return what it returns. A cancellation is told to it, and waits for its end.

    So does another one: what the work uses, such as a descriptor, is the caller's, who takes it away.
    """
    told = threading.Event()
    context = contextvars.copy_context()
    context.run(_told.set, told)
    work = asyncio.get_running_loop().run_in_executor(
        None, partial(context.run, function, *args, **kwargs)
    )
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        told.set()
        await outlast(work)
        raise
