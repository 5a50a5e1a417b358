"""Waiting in a thread for what others do: one deadline for several things, and an end at once when it is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# How soon it is noticed that nobody waits any more; a lock has no way to be told.
GLANCE_S = 0.05


class Patience:
    """Waits `timeout_s` in all, or until `given_up` is set."""

    def __init__(self, timeout_s: float, given_up: threading.Event | None = None) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._given_up = given_up or threading.Event()

    def wait(self, happens: Callable[[float], bool], complaint: str) -> None:
        """Call `happens` with the seconds that it may wait, until it says that it came to pass.

        Raises TimeoutError with `complaint` when it does not.
        """
        while not happens(min(GLANCE_S, max(0.0, self._deadline - time.monotonic()))):
            if self._given_up.is_set() or time.monotonic() >= self._deadline:
                raise TimeoutError(complaint)


class Answers:
    """Counts questions and their answers, which come in the same order: a late one is not taken for another's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = 0
        self._answered = 0
        self._ended = False

    def ask(self) -> int:
        """Count a question, before it is asked, and return its number."""
        with self._changed:
            self._asked += 1
            return self._asked

    def take(self) -> bool:
        """Count an answer; say whether there was a question."""
        with self._changed:
            self._answered += 1
            self._changed.notify_all()
            return self._answered <= self._asked

    def end(self) -> None:
        """Let nobody wait any more: no answer will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, number: int, span_s: float) -> bool:
        """Wait at most so long; say whether the question `number` has its answer, or none will come."""
        with self._changed:
            return self._changed.wait_for(lambda: self._answered >= number or self._ended, span_s)
