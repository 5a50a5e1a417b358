"""Calling a program's own functions, plain or coroutine functions, for one sandbox.

Rule: plain ones run in threads of this sandbox's own. A function that blocks outlives every deadline, for no
thread can be ended: it must not take along what other sandboxes, or the program itself, need threads for.
"""

from __future__ import annotations

import contextvars
import inspect
from asyncio import wrap_future
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

# Plain functions that run at once; more wait. They come into being when they are needed.
MAX_THREADS = 8

Result = TypeVar("Result")


class Consulting:
    """Calls functions. `close` lets the threads end."""

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._threads = ThreadPoolExecutor(max_threads, thread_name_prefix="taskvm-consulting")

    async def call(
        self, function: Callable[..., Result | Awaitable[Result]], *arguments: object
    ) -> Result:
        """Call `function`: a coroutine function here, another in a thread, where it may block."""
        result: Result | Awaitable[Result]
        if inspect.iscoroutinefunction(function):
            result = function(*arguments)
        else:
            result = await wrap_future(self.submit(function, *arguments))
        return cast("Result", await result if inspect.isawaitable(result) else result)

    def submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        """Call a plain function in a thread, as soon as there is one."""
        context = contextvars.copy_context()
        return self._threads.submit(context.run, _guarded, function, arguments)

    def close(self) -> None:
        """Begin nothing any more; what blocks is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _guarded(function: Callable[..., Result], arguments: tuple[object, ...]) -> Result:
    try:
        return function(*arguments)
    except StopIteration as error:  # no future can carry it
        raise RuntimeError("the function raised StopIteration") from error
