"""`--ask`: the user is asked, on the terminal, about a host that no rule names.

Rule 1: asked and answered is on /dev/tty, never on the guest's streams. While a question stands, nothing of the guest's
        is written to the terminal, so that no program of it can imitate or hide one; what was typed before is
        dropped.
Rule 2: one question at a time. A deadline, an end of the terminal, or a connection that goes away is no yes.
Rule 3: what the guest chose of the text is shown escaped, and cut.
"""

from __future__ import annotations

import asyncio
import os
import termios
from types import TracebackType
from typing import Literal, Self

import taskvm
from taskvm import UsageError

Answer = Literal["once", "sandbox", "deny"]

DEADLINE_S = 120.0
MAX_SHOWN = 120  # characters of a path
_MAX_LINE = 4096  # of a terminal in canonical mode (termios(3))
_ANSWERS: dict[str, Answer] = {"o": "once", "s": "sandbox", "d": "deny"}
# DECSTR: margins, colours, character sets and cursor that the guest has set are none of the question's.
_RESET = b"\x1b[!p\n"


class Asker:
    """Asks on the user's terminal inside `with`. `screen` is locked while a question stands."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self.screen: asyncio.Lock = asyncio.Lock()
        self._deadline_s = deadline_s
        self._terminal = -1

    @property
    def oversight(self) -> taskvm.Oversight:
        """What asks here."""
        return taskvm.Oversight(self.answer, deadline_s=self._deadline_s)

    async def answer(self, question: taskvm.Question) -> Answer:
        """Return what the user says."""
        async with self.screen:
            termios.tcflush(self._terminal, termios.TCIFLUSH)
            self._write(_RESET + self._render(question).encode())
            try:
                while (answer := _ANSWERS.get((await self._read_line())[:1])) is None:
                    self._write(b"taskvm: type o, s or d: ")
            except BaseException:
                self._write(b"\ntaskvm: not answered, so not this time\n")
                raise
        return answer

    def _render(self, question: taskvm.Question) -> str:
        path = taskvm.printable(question.path)
        shown = path if len(path) <= MAX_SHOWN else path[: MAX_SHOWN - 1] + "…"
        return (
            f"taskvm: the sandbox asks for {taskvm.printable(question.host)}:{question.port}\n"
            f"        {taskvm.printable(question.method)} {question.scheme} {shown}\n"
            f"        [o]nce, for this [s]andbox's life, or [d]eny ({self._deadline_s:.0f} s): "
        )

    async def _read_line(self) -> str:
        """Return the next line, in lower case; a no at the end of input."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._terminal, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._terminal)
        try:
            line = os.read(self._terminal, _MAX_LINE)
        except OSError:  # it has hung up
            line = b""
        return line.decode("utf-8", "replace").strip().lower() if line else "deny"

    def _write(self, data: bytes) -> None:
        os.write(self._terminal, data)

    def __enter__(self) -> Self:
        try:
            self._terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(
                "use --ask", "there is no terminal to ask on", "Name the hosts by --allow"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._terminal)
