"""Guests started ahead, so that a sandbox costs only what is its own.

    async with WarmPool(size=2) as pool:
        async with Sandbox.create(pool=pool) as vm: ...

A guest in the pool is awake but nobody's: it has its identity, has run `true`, and is paused. It uses no CPU, and
the memory of an idle QEMU (tens of MB). Mounts, policy, secrets, the time and fresh entropy come when it is taken.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Self

from taskvm.background import Background
from taskvm.errors import SandboxLostError, SandboxStateError, UsageError
from taskvm.guest import Guest, close_all
from taskvm.launch import fork
from taskvm.options import DEFAULT_CPUS, DEFAULT_MEMORY_MIB
from taskvm.progress import tell_terminal
from taskvm.turns import turn_to_start
from taskvm.vm.template import Progress, Template
from taskvm.vm.warm import AcceleratorChoice, prepare
from taskvm.wanted import find_wanted

MAX_SIZE = 64


class WarmPool:
    """Keeps `size` guests of one shape ready. A sandbox of another shape, or more than are ready, starts as without it.

    Enter it with `async with`: the first entry may build the image and the template. Raises UsageError for a size
    below 1 or above MAX_SIZE.
    """

    def __init__(
        self,
        size: int = 1,
        *,
        cpus: int = DEFAULT_CPUS,
        memory_mib: int = DEFAULT_MEMORY_MIB,
        image: str | None = None,
        accel: AcceleratorChoice = "auto",
        on_progress: Progress = tell_terminal,
    ) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise UsageError(f"make a warm pool of {size}", f"its size must be 1 to {MAX_SIZE}")
        self._wish = (image, accel, cpus, memory_mib, on_progress)
        self._size = size
        self._ready: deque[Guest] = deque()
        self._coming = 0
        self._template: Template | None = None
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._background = Background(self._fail)

    async def __aenter__(self) -> Self:
        image, accel, cpus, memory_mib, progress = self._wish
        wanted = await find_wanted(
            image=image, accel=accel, cpus=cpus, memory_mib=memory_mib, progress=progress
        )
        self._template = await prepare(wanted)
        self._refill()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._template = None
        try:
            await self._background.aclose()
        finally:
            ready = [*self._ready]
            self._ready.clear()
            await close_all(ready)

    async def take(self, template: Template) -> Guest | None:
        """Hand over a ready guest of `template`, running, or None when there is none; a replacement is started."""
        if self._template is None:
            raise SandboxStateError(
                "take a guest from the pool", "it is not open", "Use it inside `async with`"
            )
        while self._ready and self._template == template:
            guest = self._ready.popleft()
            self._refill()
            try:
                await guest.rouse()
            except (SandboxLostError, BaseExceptionGroup):  # it died while it waited
                await guest.close()
                continue
            except BaseException:
                await guest.close()
                raise
            return guest
        return None

    async def wait_full(self) -> None:
        """Wait until all guests are ready. Raises what kept one from starting."""
        while len(self._ready) < self._size:
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()

    def _refill(self) -> None:
        while self._template is not None and len(self._ready) + self._coming < self._size:
            self._coming += 1
            self._background.start(self._add(self._template), "start a guest ahead")

    async def _add(self, template: Template) -> None:
        try:
            async with turn_to_start():
                guest = await fork(template)
            try:
                await guest.doze()
            except BaseException:
                await guest.close()
                raise
            self._ready.append(guest)
        finally:
            self._coming -= 1
            self._changed.set()

    def _fail(self, error: BaseException) -> None:
        # A sandbox that finds the pool empty starts its own guest and meets the same error, where it is told.
        self._failure = error
        self._changed.set()
