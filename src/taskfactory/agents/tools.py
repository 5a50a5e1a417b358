"""A tool: a name, typed arguments, and what it does with the operations it is given.

Arguments come from a model, so they are checked against a type before a tool sees them. A tool that
fails raises ToolError with a text the model can act on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

from taskfactory.agents.operations import Operations
from taskfactory.agents.paths import PathMap
from taskfactory.errors import OperationError, ToolError
from taskfactory.events import Image

A = TypeVar("A", bound="Arguments")


class Arguments(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """Base of the arguments of tools: camelCase, as models are taught them."""


@dataclass(frozen=True, slots=True)
class ToolOutput:
    """What a tool call gives the model; `details` are for people and programs."""

    text: str
    details: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[Image] = ()


class FileLocks:
    """One lock for each file: of two calls in one turn that change a file, one waits for the other."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}

    @contextlib.asynccontextmanager
    async def hold(self, path: str) -> AsyncIterator[None]:
        async with self._locks.setdefault(path, asyncio.Lock()):
            yield


def _ignore(text: str) -> None:
    """Output that nobody watches."""


@dataclass(frozen=True, slots=True)
class ToolContext:
    """Where a tool acts. `on_update` hears new output of a running tool."""

    operations: Operations
    paths: PathMap
    locks: FileLocks
    on_update: Callable[[str], None] = _ignore

    def resolve(self, path: str) -> str:
        """Return the absolute path an argument means. Raises ToolError."""
        try:
            return self.paths.resolve(path)
        except ValueError as error:
            raise ToolError(str(error)) from None


@dataclass(frozen=True, slots=True)
class Tool(Generic[A]):
    """One tool. `arguments` is the type its arguments are checked against."""

    name: str
    description: str
    arguments: type[A]
    execute: Callable[[A, ToolContext], Awaitable[ToolOutput]]

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolOutput:
        """Check the arguments and do the work. Raises ToolError for whatever the model can mend."""
        try:
            msgspec.json.encode(
                arguments
            )  # refuses lone surrogates: no file or command can hold one
            typed = msgspec.convert(arguments, self.arguments)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:
            raise ToolError(f"{self.name}: wrong arguments: {error}") from None
        try:
            return await self.execute(typed, context)
        except OperationError as error:
            raise ToolError(str(error)) from error

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the arguments, for a model's tool list."""
        return msgspec.json.schema(self.arguments)


AnyTool = Tool[Any]


def builtin_tools() -> tuple[AnyTool, ...]:
    """Return the seven tools: read, write, edit, bash, grep, find, ls."""
    from taskfactory.agents import bashtool, filetools, searchtools

    return (
        filetools.READ,
        filetools.WRITE,
        filetools.EDIT,
        bashtool.BASH,
        searchtools.GREP,
        searchtools.FIND,
        filetools.LS,
    )
