"""The user's terminal, while a program of the guest has it: raw, its size followed, and restored in every ending.

Rule 1: raw means that every key is the guest's, Ctrl-C and Ctrl-Z too; only signals still reach this program.
Rule 2: signals that end this program must cancel the task that entered, so that the block is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal as signals
import termios
import tty
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

DEFAULT_SIZE = (24, 80)


class Terminal:
    """A terminal that is raw inside `with`, in the event loop of the main thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._settings = termios.tcgetattr(descriptor)
        self._changed = asyncio.Event()

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns; DEFAULT_SIZE where the terminal does not know, as on a serial line."""
        size = os.get_terminal_size(self._descriptor)
        return (size.lines, size.columns) if size.lines and size.columns else DEFAULT_SIZE

    async def follow(self, resize: Callable[[int, int], Awaitable[None]]) -> None:
        """Call `resize(rows, cols)` now and whenever the size changes, until cancelled or hung up."""
        while True:
            try:
                size = self.size
            except OSError:
                return  # EIO: it hangs up, for which the kernel sends SIGHUP and SIGCONT (tty_jobctrl.c)
            await resize(*size)
            await self._changed.wait()
            self._changed.clear()

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signals.SIGWINCH, self._changed.set)
        loop.add_signal_handler(
            signals.SIGCONT, self._take
        )  # the user's shell has had it meanwhile
        self._take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in (signals.SIGWINCH, signals.SIGCONT):
            loop.remove_signal_handler(number)
        with contextlib.suppress(termios.error):  # a terminal that has hung up has no settings
            termios.tcsetattr(self._descriptor, termios.TCSANOW, self._settings)

    def _take(self) -> None:
        with contextlib.suppress(termios.error):
            tty.setraw(self._descriptor, termios.TCSANOW)  # keeps what was typed ahead
        self._changed.set()
