"""What a serving thread waits for: one descriptor of its own, and the sources of the providers that it serves.

What the host changes as fast as it can (a build, a log, an attacker) makes a source readable without end. So whoever
attends to the sources says how long that took, and they are left alone for four times as long: the guest's requests
have four fifths of the thread, and hears of changes later, but within REST_S.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Iterable

from taskvm.fs.provider import Source

SHARE = 4
# The page on files promises a tenth of a second for what the host changes.
REST_S = 0.05
# Below this, leaving the sources alone costs more than it saves.
_WORTH_S = 0.001


class Pauses:
    """When providers let go of what is only kept for speed: once in each `every_s` with requests, and once more."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._asked = False
        self._next = math.inf

    def asked(self) -> None:
        """Note that the guest asks for something."""
        self._asked = True
        if self._next == math.inf:
            self._next = time.monotonic() + self._every_s

    @property
    def left_s(self) -> float | None:
        """For how long there is nothing to do; None is for ever."""
        return None if self._next == math.inf else max(0.0, self._next - time.monotonic())

    def is_due(self) -> bool:
        """Tell whether it is time, which it is once."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._every_s if self._asked else math.inf
        self._asked = False
        return True


class Attention:
    """Waits for `own` and for what is watched. `watch` and `unwatch` may be called while another thread waits."""

    def __init__(self, own: int) -> None:
        self._own = own
        self._sources: dict[int, Source] = {}
        self._readable = select.epoll()
        self._readable.register(own, select.EPOLLIN)
        self._of_sources = select.epoll()
        self._resting_until = 0.0  # the sources, if that is not 0
        self._readable.register(self._of_sources, select.EPOLLIN)

    def watch(self, sources: Iterable[Source]) -> None:
        """Wait for these too."""
        for source in sources:
            if source.fd not in self._sources:
                self._sources[source.fd] = source
                self._of_sources.register(source.fd, select.EPOLLIN)

    def unwatch(self, sources: Iterable[Source]) -> None:
        """Wait for these no longer. Idempotent."""
        for source in sources:
            if self._sources.pop(source.fd, None) is not None:
                self._of_sources.unregister(source.fd)

    def is_watched(self, source: Source) -> bool:
        """Tell whether a source that was ready is still to be attended to."""
        return self._sources.get(source.fd) is source

    def wait(self, timeout_s: float | None) -> tuple[bool, list[Source]]:
        """Return whether the own descriptor is readable, and which sources are; neither when the time is over."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            ready = {fd for fd, _events in self._readable.poll(self._until(end))}
            sources = []
            if self._of_sources.fileno() in ready:
                ended = self._of_sources.poll(0)
                sources = [self._sources[fd] for fd, _events in ended if fd in self._sources]
            own = self._own in ready
            if own or sources or (end is not None and time.monotonic() >= end):
                return own, sources

    def spent(self, seconds: float) -> None:
        """Note how long the sources took just now: they are left alone for SHARE times as long."""
        if seconds >= _WORTH_S:
            self._resting_until = time.monotonic() + min(SHARE * seconds, REST_S)
            self._readable.modify(self._of_sources, 0)

    def close(self) -> None:
        """Wait for nothing any more. What was watched stays open."""
        self._of_sources.close()
        self._readable.close()

    def _until(self, end: float | None) -> float | None:
        """Return for how long to wait, and let the sources be heard again when they have rested."""
        now = time.monotonic()
        if self._resting_until and self._resting_until <= now:
            self._resting_until = 0.0
            self._readable.modify(self._of_sources, select.EPOLLIN)
        ends = [each for each in (end, self._resting_until or None) if each is not None]
        return max(0.0, min(ends) - now) if ends else None
