"""Calling a user's function, plain or a coroutine function."""

from __future__ import annotations

import inspect
from asyncio import to_thread
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

Result = TypeVar("Result")


async def consult(
    function: Callable[..., Result | Awaitable[Result]], *arguments: object
) -> Result:
    """Call `function`: a coroutine function here, another in a thread, where it may block."""
    result: Result | Awaitable[Result]
    if inspect.iscoroutinefunction(function):
        result = function(*arguments)
    else:
        result = await to_thread(_guarded, function, arguments)
    return cast("Result", await result if inspect.isawaitable(result) else result)


def _guarded(
    function: Callable[..., Result | Awaitable[Result]], arguments: tuple[object, ...]
) -> Result | Awaitable[Result]:
    try:
        return function(*arguments)
    except StopIteration as error:  # no future can carry it
        raise RuntimeError("the function raised StopIteration") from error
