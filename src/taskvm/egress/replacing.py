"""Replacing known texts in a stream, whatever way it is cut into pieces.

The result is that of one pass over the whole: the leftmost text is replaced first, of those that
begin there the longest, and what was put in is never searched. Held back between two pieces is only
what may be the beginning of a known text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Replace = Callable[[bytes], bytes]


def any_of(texts: Iterable[bytes]) -> re.Pattern[bytes]:
    """Return a pattern that finds the longest of `texts`; it never matches when there are none."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile(b"|".join(map(re.escape, ordered)) or rb"(?!)")


class Replacer:
    """Puts `replace(text)` in the place of each of the texts; what `replace` raises, it raises."""

    def __init__(self, texts: Iterable[bytes], replace: Replace) -> None:
        self._texts = tuple(texts)
        self._pattern = any_of(self._texts)
        self._replace = replace
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Return what is sure of the stream after another piece of it."""
        return self._pass(self._held + data, final=False)

    def finish(self) -> bytes:
        """Return the rest, after the last piece."""
        return self._pass(self._held, final=True)

    def release(self) -> bytes:
        """Return what is held back, as it came: the stream goes on in another replacer."""
        held, self._held = self._held, b""
        return held

    def _pass(self, data: bytes, *, final: bool) -> bytes:
        sent: list[bytes] = []
        position = 0
        limit = len(data) if final else self._undecided(data, 0)
        while (match := self._pattern.search(data, position)) and match.start() < limit:
            sent += data[position : match.start()], self._replace(match.group())
            position = match.end()
            if not final and position > limit:
                limit = self._undecided(data, position)
        sent.append(data[position:limit])
        self._held = data[max(position, limit) :]
        return b"".join(sent)

    def _undecided(self, data: bytes, start: int) -> int:
        """Return where the first text that `data` ends within, and so may go on, begins."""
        first = len(data)
        for text in self._texts:
            at = max(start, len(data) - len(text) + 1)
            while (at := data.find(text[:1], at)) >= 0 and at < first:
                if text.startswith(data[at:]):
                    first = at
                    break
                at += 1
        return first
