"""Guests started ahead, for programs that block."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from taskvm import pool as aio
from taskvm.options import DEFAULT_CPUS, DEFAULT_MEMORY_MIB
from taskvm.progress import tell_terminal
from taskvm.sync.bridge import Bridge, Call
from taskvm.vm.template import Progress
from taskvm.vm.warm import AcceleratorChoice


class WarmPool:
    """Keeps `size` guests of one shape ready. A sandbox of another shape, or more than are ready, starts as without it.

    Enter it with `with`: the first entry may build the image and the template, and `on_progress` is called in the
    thread that enters. Raises UsageError for a size below 1 or above MAX_SIZE.
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
        self._bridge = Bridge.current()
        self._entering: Call | None = None
        self._on_progress = on_progress
        self._pool = aio.WarmPool(
            size,
            cpus=cpus,
            memory_mib=memory_mib,
            image=image,
            accel=accel,
            on_progress=self._report,
        )

    def __enter__(self) -> Self:
        self._entering = Call(self._bridge, undo=lambda _: self._exit())
        self._entering.run(self._enter)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bridge.release(self._exit)

    def wait_full(self) -> None:
        """Wait until all guests are ready. Raises what kept one from starting."""
        self._bridge.call(self._pool.wait_full)

    async def _enter(self) -> None:
        await self._pool.__aenter__()
        self._bridge.own(self, self._exit)

    async def _exit(self) -> None:
        try:
            await self._pool.__aexit__(None, None, None)
        finally:
            self._bridge.disown(self)

    def _report(self, line: str) -> None:
        if self._entering is not None:
            self._entering.callback(self._on_progress)(line)
