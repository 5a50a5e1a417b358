"""How far a program's memory rises above where it stood.

For programs of their own: a peak that was reached before hides a lower one, and memory that was freed before is taken
again unseen. So the kernel is told to count anew (proc(5), clear_refs), and the runner, which has done a thousand other
things, is not measured where small pieces add up.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.waiting import PATIENCE_S

_ROOT = Path(__file__).parent.parent.parent
_STATUS, _RESET_PEAK = Path("/proc/self/status"), "5"


class Peak:
    """Counts from its creation on, in the process that creates it."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        self._before_kib = _memory_kib("VmRSS")

    def growth_mib(self) -> float:
        return (_memory_kib("VmHWM") - self._before_kib) / 1024


def _memory_kib(key: str) -> int:
    (number,) = re.findall(rf"{key}:\s+(\d+) kB", _STATUS.read_text())
    return int(number)


def printed_by(program: str, *arguments: str) -> list[str]:
    """Run a Python program in a process of its own, from the checkout; return the words that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
