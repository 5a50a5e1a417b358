"""Paths of requests, as a rule writes them and as a server may read them.

A pattern is exact (`/v1/models`), or has `*` for anything within a segment and `**` for any number
of whole segments: `/repos/*/issues`, `/v1/**`, `/**/info/refs`.

Rule 1: a path that servers read in more than one way (`..`, `//`, an encoded slash, `;x`) matches
        nothing: `plain_segments` refuses it, and so does whoever has path rules.
Rule 2: allowing is strict and denying generous: `generous` ignores case and a final slash.
Rule 3: matching takes time of the order of the pattern times the path, whatever the guest sends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote_to_bytes

from taskvm.errors import UsageError

MAX_PATTERN = 512  # characters

_WRITTEN = re.compile(r"/[A-Za-z0-9._~!$&'()*+,=:@/-]*\Z")
_ESCAPE = re.compile(rb"%[0-9A-Fa-f]{2}")
_HELP = "Write it like /v1/models, /repos/*/issues or /v1/**"

Item = TypeVar("Item")


class AmbiguousPathError(ValueError):
    """Raised for a path that two programs could read differently; says why, and does not repeat it."""


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A set of paths. `segments` are what stands between the slashes, wildcards in them."""

    segments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> PathPattern:
        """Read a pattern as a person writes it. Raises UsageError."""
        operation = f"read the path pattern {text!r}"
        if not text.startswith("/"):
            raise UsageError(operation, "it does not start with /", _HELP)
        if not _WRITTEN.match(text) or len(text) > MAX_PATTERN:
            raise UsageError(
                operation, "it has escapes, a query or characters that paths do not have", _HELP
            )
        segments = tuple(text[1:].split("/"))
        if {".", ".."} & set(segments) or "" in segments[:-1]:
            raise UsageError(operation, "a segment is empty, . or .., which no path keeps", _HELP)
        if any("**" in segment and segment != "**" for segment in segments):
            raise UsageError(operation, "** stands only for whole segments", _HELP)
        return cls(segments)

    def matches(self, segments: Sequence[str], *, generous: bool = False) -> bool:
        """Say whether a path of these plain segments belongs to the set."""
        own: Sequence[str] = self.segments
        if generous:
            own = _without_final_slash([segment.lower() for segment in own])
            segments = _without_final_slash([segment.lower() for segment in segments])
        return _match(own, segments, lambda segment: segment == "**", _segment_matches)

    def __str__(self) -> str:
        return "/" + "/".join(self.segments)


def plain_segments(target: bytes) -> tuple[str, ...]:
    """Return the decoded segments of a request's target, its query left out.

    Raises AmbiguousPathError where a server could see another path than we do.
    """
    path = target.partition(b"?")[0]
    if not path.startswith(b"/"):
        raise AmbiguousPathError("it is not a path")
    if b"%" in _ESCAPE.sub(b"", path):
        raise AmbiguousPathError("a % does not start an escape")
    decoded = unquote_to_bytes(path)
    if decoded.count(b"/") != path.count(b"/"):
        raise AmbiguousPathError("a slash is encoded")
    if any(sign in decoded for sign in (b"\\", b";", b"%")) or _has_controls(decoded):
        raise AmbiguousPathError("it has a character that servers disagree on")
    try:
        segments = decoded[1:].decode("utf-8").split("/")
    except UnicodeDecodeError as error:
        raise AmbiguousPathError("it is not UTF-8") from error
    if {".", ".."} & set(segments) or "" in segments[:-1]:
        raise AmbiguousPathError("a segment is empty, . or ..")
    return tuple(segments)


def _has_controls(text: bytes) -> bool:
    return any(byte < 0x20 or byte == 0x7F for byte in text)


def _without_final_slash(segments: list[str]) -> list[str]:
    return segments[:-1] if len(segments) > 1 and not segments[-1] else segments


def _segment_matches(pattern: str, segment: str) -> bool:
    if "*" not in pattern:
        return pattern == segment
    return _match(pattern, segment, lambda sign: sign == "*", str.__eq__)


def _match(
    pattern: Sequence[Item],
    items: Sequence[Item],
    is_wildcard: Callable[[Item], bool],
    equal: Callable[[Item, Item], bool],
) -> bool:
    """Match with wildcards for any number of items: the last one is widened where the rest fails.

    An earlier wildcard need not be tried again: what the last can take is all that it could take.
    """
    position = at = 0
    wildcard, taken = -1, 0
    while at < len(items):
        if position < len(pattern) and is_wildcard(pattern[position]):
            wildcard, taken = position, at
            position += 1
        elif position < len(pattern) and equal(pattern[position], items[at]):
            position, at = position + 1, at + 1
        elif wildcard >= 0:
            taken += 1
            position, at = wildcard + 1, taken
        else:
            return False
    return all(is_wildcard(item) for item in pattern[position:])
