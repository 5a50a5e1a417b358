"""Glob patterns for paths, matched in time linear in the path: neither pattern nor name is trusted. Pure.

`*`, `?` and `[…]` match within one name, `**` any number of names, `{a,b}` is either. A pattern
without `/` is for the last name of a path, others are for the whole path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

MAX_PATTERN = 1000  # characters
MAX_ALTERNATIVES = 64


def compile_glob(pattern: str) -> Callable[[str], bool]:
    """Return a test for relative paths. Raises ValueError for a pattern that is too long or too wide."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"it has more than {MAX_PATTERN} characters")
    anchored = "/" in pattern
    alternatives = [text.strip("/").split("/") for text in _expand(pattern)]

    def matches(path: str) -> bool:
        names = path.split("/") if anchored else [path.rpartition("/")[2]]
        return any(_match(segments, names) for segments in alternatives)

    return matches


def _match(segments: list[str], names: list[str]) -> bool:
    """Walk all ways through the segments at once; a state is the segment that comes next."""
    last = len(segments) - 1
    states = _skip_stars({0}, segments)
    for name in names:
        moved = set()
        for state in states:
            if state > last:
                continue
            if segments[state] == "**":
                moved |= {state, state + 1} if state == last else {state}
            elif fnmatchcase(name, segments[state]):
                moved.add(state + 1)
        states = _skip_stars(moved, segments)
    return len(segments) in states


def _skip_stars(states: Iterable[int], segments: list[str]) -> set[int]:
    """`**` may match no name at all, except at the end, where it means something below."""
    closed = set(states)
    for state in sorted(closed):
        following = state
        while following < len(segments) - 1 and segments[following] == "**":
            following += 1
            closed.add(following)
    return closed


def _expand(pattern: str) -> list[str]:
    """Return the patterns that `{a,b}` stands for. Braces that do not pair stand for themselves."""
    done, waiting = [], [pattern]
    while waiting:
        text = waiting.pop()
        found = _first_braces(text)
        if found is None:
            done.append(text)
        else:
            start, end, choices = found
            waiting += [text[:start] + choice + text[end:] for choice in reversed(choices)]
        if len(done) + len(waiting) > MAX_ALTERNATIVES:
            raise ValueError(f"its braces make more than {MAX_ALTERNATIVES} patterns")
    return done


def _first_braces(text: str) -> tuple[int, int, list[str]] | None:
    start = text.find("{")
    depth, begin, choices = 0, start + 1, []
    for position in range(start, len(text)) if start >= 0 else ():
        sign = text[position]
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if (sign == "," and depth == 1) or depth == 0:
            choices.append(text[begin:position])
            begin = position + 1
        if depth == 0:
            return start, position + 1, choices
    return None
