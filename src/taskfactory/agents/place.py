"""The place where an agent's tools act: the sandbox's guest, or the host when the sandbox is off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from taskfactory.agents.host import HostOperations
from taskfactory.agents.operations import Operations
from taskfactory.agents.paths import PathMap


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that the sandbox kept from leaving: what was asked for, and the reason."""

    target: str
    reason: str


def _nothing_refused() -> Sequence[Refusal]:
    return ()


@dataclass(frozen=True, slots=True)
class Place:
    """Operations, and how paths are meant there. `refusals` reads what was refused so far, also afterwards."""

    operations: Operations
    paths: PathMap
    sandboxed: bool
    description: str
    refusals: Callable[[], Sequence[Refusal]] = _nothing_refused

    def with_operations(self, operations: Operations) -> Place:
        """Return the same place, acted on through other operations."""
        return replace(self, operations=operations)


def host_place(workspace: Path) -> Place:
    """Return the host itself: no isolation, no policy."""
    root = str(workspace.resolve())
    return Place(
        operations=HostOperations(),
        paths=PathMap(host_roots=host_roots(workspace), root=root, home=str(Path.home())),
        sandboxed=False,
        description="on the host, NOT sandboxed",
    )


def host_roots(workspace: Path) -> tuple[str, ...]:
    """Return every spelling of the workspace's path that a person may use, longest first."""
    spellings = {str(workspace.absolute()), str(workspace.resolve())}
    return tuple(sorted(spellings, key=len, reverse=True))
