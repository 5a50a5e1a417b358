"""What can be awaited, to have it, or entered, to have it closed again: the result of `Sandbox.create` and its like."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar


class Closable(Protocol):
    """What releases what it holds by `close`."""

    async def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


class Opening(Generic[T]):
    """Something that has not begun yet: `await` it, or use it with `async with`, which closes it at the end.

    Nothing happens, and nothing is held, before either.
    """

    def __init__(self, begin: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._begin = begin
        self._opened: T | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            """Say what is forgotten most easily, to who has no type checker."""
            raise AttributeError(
                f"{name}: this has not begun yet; await it, or use it with `async with` (taskvm.sync needs neither)",
                name=name,
                obj=self,
            )

    def __await__(self) -> Generator[Any, None, T]:
        return self._begin().__await__()

    async def __aenter__(self) -> T:
        self._opened = await self._begin()
        return self._opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._opened is not None:
            await self._opened.close()
