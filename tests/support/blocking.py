"""The synchronous surface dressed as the asynchronous one, so that one suite makes its claims about both.

Every call goes to a thread and blocks there; what it returns is dressed in turn. What a call iterates over is asked for
from its own thread, piece by piece, as a program that blocks would.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Self

from taskvm import sync

# Of our own, because asyncio's has few threads on a small machine, and some tests have 64 commands wait for each other.
_THREADS = ThreadPoolExecutor(max_workers=128, thread_name_prefix="blocking")
_END = object()


async def _in_thread(function: Callable[..., Any], *args: object, **options: Any) -> Any:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_THREADS, lambda: function(*args, **options))


class Dressed:
    """An object of `taskvm.sync` whose methods are awaited."""

    def __init__(self, twin: Any) -> None:
        self._twin = twin

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._twin, name)
        return _awaitable(value) if callable(value) else dressed(value)

    def __str__(self) -> str:
        return str(self._twin)

    def text(self) -> AsyncIterator[str]:
        return _stepped(self._twin.text())

    def open_read(self, *args: object, **options: Any) -> AsyncIterator[bytes]:
        return _stepped(self._twin.open_read(*args, **options))

    def __aiter__(self) -> AsyncIterator[Any]:
        iterator = iter(self._twin)
        return self if iterator is self._twin else _stepped(iterator)

    async def __anext__(self) -> Any:
        if (item := await _in_thread(next, self._twin, _END)) is _END:
            raise StopAsyncIteration
        return item

    async def __aenter__(self) -> Self:
        await _in_thread(self._twin.__enter__)
        return self

    async def __aexit__(self, *error: object) -> None:
        await _in_thread(self._twin.__exit__, *error)


class Opening:
    """A call that is awaited, or entered to close what it returns: `async with vm.forward(1) as forward`."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._opened: Any = None

    def __await__(self) -> Generator[Any, None, Any]:
        return self._run().__await__()

    async def _run(self) -> Any:
        return dressed(await _in_thread(self._call))

    async def __aenter__(self) -> Any:
        self._opened = await self._run()
        return await self._opened.__aenter__()

    async def __aexit__(self, *error: object) -> None:
        await self._opened.__aexit__(*error)


def dressed(value: object) -> Any:
    """Dress what is live; values, and what has no methods that wait (ChangeSet), are the same on both surfaces."""
    live = (sync.Sandbox, sync.Process, sync.ByteStream, sync.Files, sync.FileWatch, sync.Forward)
    return Dressed(value) if isinstance(value, live) else value


def _awaitable(method: Any) -> Any:
    def call(*args: object, **options: Any) -> Opening:
        taken = [_plain(value) for value in args]
        named = {name: _plain(value) for name, value in options.items()}
        return Opening(lambda: method(*taken, **named))

    return call


def _plain(value: object) -> object:
    return _pulled(value) if isinstance(value, AsyncIterator) else value


def _pulled(source: AsyncIterator[Any]) -> Iterator[Any]:
    """Iterate, in a thread, over what runs in this loop. Made here, because a generator's body runs there."""
    loop = asyncio.get_running_loop()

    async def piece() -> Any:
        return await anext(source, _END)

    def pieces() -> Iterator[Any]:
        while (item := asyncio.run_coroutine_threadsafe(piece(), loop).result()) is not _END:
            yield item

    return pieces()


async def _stepped(source: Iterator[Any]) -> AsyncIterator[Any]:
    try:
        while (item := await _in_thread(next, source, _END)) is not _END:
            yield item
    finally:
        with suppress(AttributeError):  # not every iterator is a generator
            source.close()  # type: ignore[attr-defined]
