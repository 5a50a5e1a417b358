"""Tasks that outlive the call that started them, owned by one object that ends them, or waited for to their end.

A TaskGroup cannot span `await Sandbox.create()` … `await sandbox.aclose()`, so the sandbox owns a Background
instead. Rules: every task has a name and an owner; an exception of a task is handed to `on_failure` once, never
lost; `aclose` cancels what still runs and waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def finished(
    work: Coroutine[Any, Any, _T], *, hurry: Callable[[], None] = lambda: None
) -> _T:
    """Return the result of `work`, which is not cancelled with its caller, because it must not be left halfway.

    A caller that is cancelled calls `hurry`, waits for the end of `work`, and is cancelled then.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        hurry()
        await outlast(task)
        raise


async def outlast(*works: asyncio.Future[_T]) -> None:
    """Wait until all `works` have ended, however often the caller is cancelled; what they raise is dropped.

    For a caller that has been cancelled, and would take away what they use.
    """
    while running := [work for work in works if not work.done()]:
        with contextlib.suppress(asyncio.CancelledError):  # again; the caller raises the first
            await asyncio.wait(running)
    for work in works:
        if not work.cancelled():
            work.exception()  # retrieved: the caller's cancellation comes first


class Background:
    """Owns running tasks. `on_failure` is called with the exception of a task that failed (not of a cancelled one)."""

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `work` until it ends or the owner closes."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def aclose(self) -> None:
        """Cancel every task and wait until all have ended. Idempotent, also when this was cancelled itself."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            if not task.cancelling():  # else it is releasing what it holds
                task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._on_failure(error)
