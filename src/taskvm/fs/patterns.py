"""Which paths a list of patterns means, with the syntax of gitignore(5). Pure.

Where the two readings of something differ, more is meant, not less, because what is meant is hidden from a guest:

1. Names are compared as a file system that ignores case, Unicode forms, invisible characters and trailing dots would
   compare them; `!` takes back only names that match to the letter.
2. A pattern that git would ignore because it can never match is a UsageError.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from taskvm.errors import UsageError

Path = tuple[bytes, ...]
Reached = frozenset[int]  # how many segments of a pattern the names of a path can have used up
# Each has some hundred bytes.
_DIRECTORIES_REMEMBERED = 8192
_ANY = None  # the segment `**`
_BEGIN: Reached = frozenset({0})

_POSIX_CLASSES = {
    "alnum": "a-zA-Z0-9", "alpha": "a-zA-Z", "blank": r" \t", "cntrl": r"\x00-\x1f\x7f", "digit": "0-9",
    "graph": r"\x21-\x7e", "lower": "a-z", "print": r"\x20-\x7e", "punct": r"!-/:-@\[-`{-~", "space": r"\s",
    "upper": "A-Z", "xdigit": "0-9a-fA-F",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pattern:
    """One line: a segment for each name of a path, `_ANY` for any number of them."""

    text: str
    segments: tuple[re.Pattern[str] | None, ...]
    directories_only: bool
    negated: bool

    @classmethod
    def parse(cls, line: str) -> list[Self]:
        """Read one line; nothing for a comment or an empty one. Raises UsageError."""
        text = re.sub(r"(?<!\\) +\Z", "", line.rstrip("\r\n"))
        if not text or text.startswith("#"):
            return []
        negated = text.startswith("!")
        body = text.removeprefix("!")
        directories_only = body.endswith("/")
        body = body.removesuffix("/")
        names = body.removeprefix("/").split("/")
        if not all(names) or {".", ".."} & set(names):
            raise UsageError(f"hide {line!r}", "it is no pattern of names below the mount")
        if "/" not in body:
            segments: list[re.Pattern[str] | None] = [_ANY, _compile(body, line, negated)]
            return [cls(text, tuple(segments), directories_only, negated)]
        return [
            cls(
                text,
                tuple(_ANY if name == "**" else _compile(name, line, negated) for name in each),
                directories_only,
                negated,
            )
            for each in _readings(names)
        ]

    @property
    def by_name(self) -> bool:
        """Whether only the last name of a path counts."""
        return len(self.segments) == 2 and self.segments[0] is _ANY

    def step(self, reached: Reached, spellings: tuple[str, ...]) -> Reached:
        """Return how many segments can be used up with one name more, which is given in all its spellings."""
        if not reached:
            return reached
        return frozenset(self._after(self._skipped(reached), spellings))

    def matches(self, reached: Reached, spellings: tuple[str, ...], *, directory: bool) -> bool:
        """Say whether a path is meant that ends in this name; `reached` is what its directory has used up."""
        if self.directories_only and not directory:
            return False
        if self.by_name and (last := self.segments[1]) is not None:  # nearly all patterns
            return any(map(last.fullmatch, spellings))
        return len(self.segments) in self.step(reached, spellings)

    def _skipped(self, reached: Reached) -> Iterator[int]:
        """What can be reached without a name: `**` may stand for none."""
        for position in reached:
            yield position
            if position < len(self.segments) and self.segments[position] is _ANY:
                yield position + 1

    def _after(self, positions: Iterable[int], spellings: tuple[str, ...]) -> Iterator[int]:
        for position in positions:
            if position == len(self.segments):
                continue
            segment = self.segments[position]
            if segment is _ANY:
                yield position
            elif any(segment.fullmatch(spelling) for spelling in spellings):
                yield position + 1


class Directory:
    """What is known of one: whether it is meant, or one above it, and what each pattern has used up of its path."""

    __slots__ = ("children", "reached", "within")

    def __init__(self, reached: tuple[Reached, ...], *, within: bool) -> None:
        self.reached = reached
        self.within = within
        self.children: dict[bytes, Directory] = {}


class Patterns:
    """Patterns of which the last that matches decides. A directory that is meant takes along all that is in it."""

    def __init__(self, lines: Iterable[str]) -> None:
        if isinstance(lines, str):
            raise UsageError(f"hide {lines!r}", "it is one text", "Give a list of patterns")
        self.patterns: tuple[Pattern, ...] = tuple(
            pattern for line in lines for pattern in Pattern.parse(line)
        )
        self.by_name: bool = all(pattern.by_name for pattern in self.patterns)
        """Whether a path is judged by its names alone, wherever they are: moving its parents changes nothing."""
        # Each lookup of a guest asks for the directories on the way again, and they can be thousands, one in another.
        # Mounts share what is known, each in its own thread: at worst two find out the same.
        self._root = Directory(tuple(_BEGIN for _ in self.patterns), within=False)
        self._remembered = 0

    def __repr__(self) -> str:
        return repr([pattern.text for pattern in self.patterns])

    def hides(self, path: Path, *, directory: bool) -> bool:
        """Say whether `path`, or a directory on the way to it, is meant."""
        above = self._directory(path[:-1])
        return above.within or self._means(above, path[-1], directory=directory)

    def may_hide(self, path: Path) -> bool:
        """Say whether `path` is hidden as a file, or as a directory: what a new thing of this name may become."""
        above = self._directory(path[:-1])
        return above.within or any(
            self._means(above, path[-1], directory=directory) for directory in (False, True)
        )

    def _directory(self, path: Path) -> Directory:
        directory = self._root
        for name in path:
            directory = directory.children.get(name) or self._entered(directory, name)
        return directory

    def _entered(self, above: Directory, name: bytes) -> Directory:
        """Find out about the directory `name` in `above`, and remember it."""
        if above.within:
            within, reached = True, above.reached  # nothing below is asked about any more
        else:
            within = self._means(above, name, directory=True)
            reached = tuple(
                before if pattern.by_name else pattern.step(before, spellings)
                for pattern, before, spellings in self._each(above, name)
            )
        if self._remembered >= _DIRECTORIES_REMEMBERED:
            self._root.children.clear()
            self._remembered = 0
        self._remembered += 1
        entered = above.children[name] = Directory(reached, within=within)
        return entered

    def _means(self, above: Directory, name: bytes, *, directory: bool) -> bool:
        """Say whether `name` in `above` is meant itself: the last pattern that matches it decides."""
        for pattern, reached, spellings in reversed(self._each(above, name)):
            if pattern.matches(reached, spellings, directory=directory):
                return not pattern.negated
        return False

    def _each(
        self, above: Directory, name: bytes
    ) -> list[tuple[Pattern, Reached, tuple[str, ...]]]:
        folded, exact = _spellings(name), (os.fsdecode(name),)
        return [
            (pattern, reached, exact if pattern.negated else folded)
            for pattern, reached in zip(self.patterns, above.reached, strict=True)
        ]


def _spellings(name: bytes) -> tuple[str, ...]:
    """Return `name` as case-insensitive file systems compare it, and without what some of them drop at the end."""
    folded = _fold(os.fsdecode(name))
    stripped = folded.rstrip(". ")
    return (folded, stripped) if stripped and stripped != folded else (folded,)


def _fold(text: str) -> str:
    if text.isascii():
        return text.lower()
    visible = "".join(each for each in text if unicodedata.category(each) != "Cf")
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())


# One line to segments, and a segment to a regular expression...


def _readings(names: list[str]) -> list[list[str]]:
    """Return the lists of segments that a line with a slash stands for."""
    names = [re.sub(r"\A\*{3,}\Z", "**", name) for name in names]
    before, name, after = _first_with_a_wildcard(names)
    readings = [names]
    if name is not None and (stars := re.fullmatch(r"([^*?\[\\]+)\*{2,}", name)):
        # git compares what is before the first wildcard by itself, and takes `a**` for `a` and then a real `**`.
        lead = [*before, stars[1] + "*"]
        readings = [[*lead, "**", *after]] if after else [lead, [*lead, "**"]]
    return [_without_repetitions(each) for each in readings]


def _first_with_a_wildcard(names: list[str]) -> tuple[list[str], str | None, list[str]]:
    for place, name in enumerate(names):
        if re.search(r"[*?\[\\]", name):
            return names[:place], name, names[place + 1 :]
    return names, None, []


def _without_repetitions(names: list[str]) -> list[str]:
    if names[-1] == "**":  # what is below a directory, and not the directory itself
        names = [*names, "*"]
    # Several `**` in a row say what one does, and `_skipped` looks past one.
    return [
        name
        for before, name in zip(["", *names], names, strict=False)
        if (before, name) != ("**", "**")
    ]


def _compile(segment: str, line: str, negated: bool) -> re.Pattern[str]:
    text = segment if negated else _fold(segment)
    try:
        parts = _parts(text)
    except ValueError as error:
        raise UsageError(f"hide {line!r}", str(error)) from None
    if len(parts) == 1:
        return re.compile(parts[0], re.DOTALL)
    # Each `*` takes as little as it can and never more again: no name makes this slow.
    middle = "".join(f"(?>.*?{part})" for part in parts[1:-1] if part)
    return re.compile(f"{parts[0]}{middle}.*{parts[-1]}", re.DOTALL)


def _parts(text: str) -> list[str]:
    """Return the expressions between the stars."""
    parts = [""]
    position = 0
    while position < len(text):
        each = text[position]
        position += 1
        if each == "*":
            parts.append("")
        elif each == "?":
            parts[-1] += "."
        elif each == "[":
            expression, position = _bracket(text, position)
            parts[-1] += expression
        elif each == "\\":
            if position == len(text):
                raise ValueError("it ends in a backslash")
            parts[-1] += re.escape(text[position])
            position += 1
        else:
            parts[-1] += re.escape(each)
    return parts


def _bracket(text: str, position: int) -> tuple[str, int]:
    """Read a bracket expression behind its `[`; return it and where it ends."""
    negated = text[position : position + 1] in ("!", "^")
    position += negated
    members, first = "", True
    while first or text[position : position + 1] != "]":
        first = False
        if position >= len(text):
            raise ValueError("a [ is never closed")
        if posix := re.compile(r"\[:(\w+):\]").match(text, position):
            if posix[1] not in _POSIX_CLASSES:
                raise ValueError(f"there is no class [:{posix[1]}:]")
            members += _POSIX_CLASSES[posix[1]]
            position = posix.end()
            continue
        low, position = _member(text, position)
        high = low
        if text[position : position + 1] == "-" and text[position + 1 : position + 2] not in (
            "",
            "]",
        ):
            high, position = _member(text, position + 1)
        if low > high:
            raise ValueError(f"the range {low}-{high} is empty")
        members += f"{re.escape(low)}-{re.escape(high)}"
    return f"[{'^' if negated else ''}{members}]", position + 1


def _member(text: str, position: int) -> tuple[str, int]:
    """Read one character of a bracket expression, escaped or not."""
    position += text[position] == "\\"
    if position >= len(text):
        raise ValueError("a [ is never closed")
    return text[position], position + 1
