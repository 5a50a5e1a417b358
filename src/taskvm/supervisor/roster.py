"""All sandboxes of one supervisor: those that run, those that start, and for a while those that have ended."""

from __future__ import annotations

import asyncio
import re
import time

from taskvm.errors import SandboxStateError, UsageError
from taskvm.supervisor.holding import Holding, Recipe
from taskvm.wire.supervision import Launch

MAX_SANDBOXES = 256
# What has ended is remembered, with its last output: about 1 MiB each at most.
MAX_ENDED = 32
KEPT_S = 3600.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")
_ID_PREFIX = "sandbox-"


class Roster:
    """The sandboxes by id."""

    def __init__(self) -> None:
        self._holdings: dict[str, Holding] = {}
        self._starting: list[str | None] = []  # their names
        self._closing = False

    async def start(self, recipe: Recipe, name: str | None, launch: Launch | None) -> Holding:
        """Start a sandbox. Raises UsageError for a name that is taken or none, and as `Sandbox.create`."""
        self._check(name)
        self._starting.append(name)
        try:
            holding = await Holding.start(recipe, name, launch)
        finally:
            self._starting.remove(name)
        self._holdings[holding.vm.id] = holding
        if self._closing:
            holding.end("the supervisor was stopped")
        return holding

    def all(self) -> list[Holding]:
        """Return them, oldest first; those that ended long ago are forgotten."""
        ended = [each for each in self._holdings.values() if each.ended.is_set()]
        stale = {id(each) for each in ended[: max(0, len(ended) - MAX_ENDED)]}
        for each in ended:
            if id(each) in stale or time.monotonic() - each.ended_s > KEPT_S:
                del self._holdings[each.vm.id]
        return list(self._holdings.values())

    @property
    def empty(self) -> bool:
        """Whether there is nothing to keep the supervisor for."""
        return not self._starting and not self.all()

    def find(self, text: str) -> Holding:
        """Return the sandbox of that name, id, or beginning of an id. Raises UsageError."""
        found = self.all()
        named = [each for each in found if each.name == text]
        running = [each for each in named if each.running]
        matches = running or named[-1:] or [each for each in found if _fits(each.vm.id, text)]
        if len(matches) == 1:
            return matches[0]
        raise UsageError(
            f"find the sandbox {text!r}",
            "several have an id that begins so" if matches else "there is none",
            "`taskvm ps` lists those that run, with --all also those that have ended",
        )

    def find_running(self, text: str) -> Holding:
        """Return the sandbox as `find` does. Raises SandboxStateError when it has ended."""
        holding = self.find(text)
        if not holding.running:
            raise SandboxStateError(f"use the sandbox {text}", f"it has ended: {holding.outcome}")
        return holding

    async def close(self, outcome: str) -> None:
        """End every sandbox, and every one that comes."""
        self._closing = True
        for holding in self._holdings.values():
            holding.end(outcome)
        waits = [holding.ended.wait() for holding in self._holdings.values()]
        await asyncio.gather(*waits)

    def _check(self, name: str | None) -> None:
        operation = f"start the sandbox {name}" if name else "start a sandbox"
        running = [each for each in self.all() if each.running]
        if self._closing:
            raise UsageError(operation, "the supervisor is being stopped", "Try again")
        if len(running) + len(self._starting) >= MAX_SANDBOXES:
            raise UsageError(operation, f"{MAX_SANDBOXES} run already", "Stop some of them")
        if name is None:
            return
        if not _NAME.match(name) or name.startswith(_ID_PREFIX):
            raise UsageError(
                operation, "a name has up to 63 letters, digits and _.- and is not like an id"
            )
        if name in self._starting or any(each.name == name for each in running):
            raise UsageError(operation, "another one has this name", "Choose another name")


def _fits(sandbox_id: str, text: str) -> bool:
    return bool(text) and (
        sandbox_id.startswith(text) or sandbox_id.removeprefix(_ID_PREFIX).startswith(text)
    )
