"""A terminal with `taskvm` on it, as its user sees it."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from tests.support.waiting import PATIENCE_S

TASKVM = str(Path(sys.executable).with_name("taskvm"))
SMALL = ["--cpus", "1", "--memory", "256", "-q"]
# readline asks for bracketed paste once it reads keys: what is typed before, the terminal may still interpret.
PROMPT = b"\x1b[?2004h"


class Screen:
    """A terminal with a program on it, as its user sees it."""

    def __init__(self, *arguments: str, size: tuple[int, int] = (24, 80)) -> None:
        self._leader, self._follower = pty.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self._follower)
        self.seen = b""
        self.process = subprocess.Popen(
            [TASKVM, *arguments],
            stdin=self._follower,
            stdout=self._follower,
            stderr=self._follower,
            start_new_session=True,
            preexec_fn=self._control,
            env={**os.environ, "TERM": "vt220"},
        )

    def _control(self) -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    @property
    def settings(self) -> list[object]:
        return list(termios.tcgetattr(self._follower))

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self._leader, keys)

    def wait_for(self, text: bytes) -> None:
        """Read what is shown until `text` is, and forget it up to there."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            ready, _, _ = select.select([self._leader], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} was not shown, only {self.seen!r}"
            self.seen += os.read(self._leader, 65536)
        self.seen = self.seen.partition(text)[2]

    def hang_up(self) -> None:
        """Close the terminal, as the end of a connection does: the kernel sends SIGHUP to the session's leader."""
        os.close(self._leader)
        self._leader = os.open(os.devnull, os.O_RDWR)

    def end(self) -> int:
        """Return the program's exit status."""
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)
        os.close(self._follower)
