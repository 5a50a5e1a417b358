"""A few threads for what waits for a disk and needs nothing of a provider any more: fsync(2) takes as long as it takes.

There are no more than MOST, made when they are needed: whoever finds all of them busy does the work itself, so what
waits is bounded, and a guest that asks for more than a disk can do waits for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

MOST = 4


class Aside:
    """Runs calls, which raise nothing, in threads of its own. `run` and `finish` belong to one thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = 0
        self._closed = False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = 0

    def run(self, call: Callable[[], None]) -> bool:
        """Run `call` in a thread; False when none is free."""
        with self._changed:
            if self._closed or self._busy == MOST:
                return False
            self._busy += 1
        if self._threads < self._busy:
            self._threads += 1
            threading.Thread(target=self._run, name="taskvm-fs-aside", daemon=True).start()
        self._calls.put(call)
        return True

    def finish(self) -> None:
        """Return when all that was begun is done, or this is closed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy or self._closed)

    def close(self) -> None:
        """Begin nothing more, and wait for nothing. Idempotent, from any thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for _ in range(MOST):
            self._calls.put(None)

    def _run(self) -> None:
        while call := self._calls.get():
            call()
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()
