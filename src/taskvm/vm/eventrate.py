"""How many events QEMU sends: each costs this process some 50 microseconds, and a guest can cause 18 000 a second.

Not reading them would only move the heap of them into QEMU, so a guest that keeps it up is ended. A full disk gives an
event for each write that fails: bursts pass.
"""

from __future__ import annotations

SPAN_S = 5.0
# Programs that wrote on and on to a full disk caused 94 in five seconds.
MAX_EVENTS = 10_000


class EventRate:
    """Counts events in spans of SPAN_S. Time is an argument."""

    def __init__(self) -> None:
        self._begun_s = 0.0
        self._count = 0

    def exceeds(self, now_s: float) -> bool:
        """Count one event; return whether there are more than MAX_EVENTS in this span."""
        if now_s - self._begun_s > SPAN_S:
            self._begun_s, self._count = now_s, 0
        self._count += 1
        return self._count > MAX_EVENTS
