"""When a sandbox of the supervisor is idle. Pure: the clock and what is seen are arguments.

`Limits.idle_timeout_s` takes every running command for activity, as is right for a program that waits for one. Here a
shell may wait at its prompt for days. So: nobody is attached, nothing was asked, no byte has moved, no connection is
open, and its processors do next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of one processor. A guest at a shell's prompt takes less than 0.01 without KVM; a build takes more than 0.5.
IDLE_CPU_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What is seen of a sandbox at one moment. `moved` grows with every use, `cpu_s` is what it has used so far."""

    now_s: float
    moved: int
    busy: bool
    cpu_s: float


class Idleness:
    """Says for how long a sandbox has been idle."""

    def __init__(self, first: Look) -> None:
        self._last = first
        self._active_s = first.now_s

    def idle_s(self, look: Look) -> float:
        """Take another look and return the seconds since the last activity."""
        last, self._last = self._last, look
        used_s = look.cpu_s - last.cpu_s
        if (
            look.busy
            or look.moved != last.moved
            or used_s > IDLE_CPU_SHARE * (look.now_s - last.now_s)
        ):
            self._active_s = look.now_s
        return look.now_s - self._active_s
