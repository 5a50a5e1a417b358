"""The synchronous surface dressed as the asynchronous one, so that one suite makes its claims about both.

Every call goes to a thread and blocks there; what it returns is dressed in turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

from taskvm import sync


class Dressed:
    """An object of `taskvm.sync` whose methods are awaited."""

    def __init__(self, twin: object) -> None:
        self._twin = twin

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._twin, name)
        return _awaitable(value) if callable(value) else dressed(value)

    def text(self) -> AsyncIterator[str]:
        return _stepped(self._twin.text())

    def open_read(self, *args: object, **options: Any) -> AsyncIterator[bytes]:
        return _stepped(self._twin.open_read(*args, **options))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _stepped(iter(self._twin))

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._twin.__enter__)
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self._twin.__exit__, *error)


def dressed(value: object) -> Any:
    """Dress what is live; values are the same on both surfaces."""
    live = (sync.Sandbox, sync.Process, sync.ByteStream, sync.Files)
    return Dressed(value) if isinstance(value, live) else value


def _awaitable(method: Any) -> Any:
    async def call(*args: object, **options: Any) -> object:
        taken = [await _plain(value) for value in args]
        named = {name: await _plain(value) for name, value in options.items()}
        return dressed(await asyncio.to_thread(method, *taken, **named))

    return call


async def _plain(value: object) -> object:
    return iter([item async for item in value]) if isinstance(value, AsyncIterator) else value


async def _stepped(source: Iterator[Any]) -> AsyncIterator[Any]:
    while (item := await asyncio.to_thread(next, source, None)) is not None:
        yield item
