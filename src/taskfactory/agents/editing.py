"""Finding and replacing text as a model remembers it, without touching the rest of a file. Pure.

Rule 1: every edit is looked up in the original text, occurs there exactly once, and overlaps no other.
Rule 2: an exact match is preferred. Only when there is none, look-alikes count: compatibility forms
        (NFKC), quotes, dashes and spaces of other kinds, blanks at the ends of lines.
Rule 3: only the matched bytes change. A byte order mark and the line endings stay as they are.
"""

from __future__ import annotations

import difflib
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from taskfactory.errors import ToolError

_BOM = "\ufeff"
# Between the first and the last changed line; a diff of more takes longer than anyone would read it.
MAX_DIFF_LINES = 2000
_CONTEXT = 3  # lines around a change
_LINE_END = re.compile(r"[^\S\n]*(?:\n|\Z)")
_LAST_BLANKS = re.compile(r"[^\S\n]+\Z")
_END = "\0"  # no blank: what stands before it is not at the end of a line
_HUNK = re.compile(r"\A@@ -(\d+)(,\d+|) \+(\d+)(,\d+|) @@\Z")
# Quotes, and hyphens, dashes and the minus sign, by code point.
_LOOKALIKES = (
    dict.fromkeys(range(0x2018, 0x201C), "'")
    | dict.fromkeys(range(0x201C, 0x2020), '"')
    | dict.fromkeys([*range(0x2010, 0x2016), 0x2212], "-")
)


@dataclass(frozen=True, slots=True)
class Replacement:
    """One edit: the text that is there, and the text that shall be."""

    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Edited:
    """The new content, a unified diff, and the first changed line of the new content (from 1)."""

    text: str
    diff: str
    first_changed_line: int


def apply_edits(original: str, edits: Sequence[Replacement], name: str) -> Edited:
    """Return the edited text. Raises ToolError that says which edit does not fit, and why."""
    if not edits:
        raise ToolError(
            f"edit {name}: there is nothing to replace; give edits or oldText and newText"
        )
    bom, text = (_BOM, original[1:]) if original.startswith(_BOM) else ("", original)
    ending = _line_ending(text)
    found = [
        (*_find(text, edit.old, _label(name, number, len(edits))), edit.new)
        for number, edit in enumerate(edits, 1)
    ]
    found.sort()
    for (_, end, _), (start, _, _) in itertools.pairwise(found):
        if start < end:
            raise ToolError(f"edit {name}: two edits overlap; join them into one")
    pieces, position = [], 0
    for start, end, new in found:
        pieces += [text[position:start], _to_lf(new).replace("\n", ending)]
        position = end
    result = "".join([*pieces, text[position:]])
    if result == text:
        raise ToolError(f"edit {name}: the old and the new text are the same; nothing was changed")
    return _edited(text, result, name, bom)


def _edited(before: str, after: str, name: str, bom: str) -> Edited:
    old, new = _to_lf(before).split("\n"), _to_lf(after).split("\n")
    head = _common(old, new)
    tail = _common(old[head:][::-1], new[head:][::-1])
    start = max(head - _CONTEXT, 0)
    end = max(tail - _CONTEXT, 0)
    window = old[start : len(old) - end], new[start : len(new) - end]
    return Edited(bom + after, _diff(*window, name, start), head + 1)


def _common(old: Sequence[str], new: Sequence[str]) -> int:
    """Return how many lines at the beginning are the same."""
    pairs = enumerate(zip(old, new, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(old), len(new)))


def _diff(old: list[str], new: list[str], name: str, start: int) -> str:
    """Return a unified diff of two stretches that begin after line `start` of their file."""
    if max(len(old), len(new)) > MAX_DIFF_LINES:
        return ""
    lines = difflib.unified_diff(old, new, name, name, n=_CONTEXT, lineterm="")
    return "\n".join(_HUNK.sub(lambda hunk: _shifted(hunk, start), line) for line in lines)


def _shifted(hunk: re.Match[str], start: int) -> str:
    return f"@@ -{int(hunk[1]) + start}{hunk[2]} +{int(hunk[3]) + start}{hunk[4]} @@"


# Finding...


def _find(text: str, old: str, label: str) -> tuple[int, int]:
    """Return where `old` begins and ends in `text`."""
    wanted = _to_lf(old.removeprefix(_BOM))
    if not wanted:
        raise ToolError(f"{label}: oldText is empty; give the text to replace, or use write")
    for search in (_find_exactly, _find_alike):
        hits = search(text, wanted)
        if len(hits) == 1:
            return hits[0]
        if hits:
            lines = ", ".join(str(text.count("\n", 0, start) + 1) for start, _ in hits[:5])
            raise ToolError(
                f"{label}: oldText occurs {len(hits)} times (lines {lines});"
                " add lines around it until it is unique"
            )
    raise ToolError(f"{label}: oldText is not in the file; read the file again and copy it exactly")


def _find_exactly(text: str, wanted: str) -> list[tuple[int, int]]:
    return _View(text, _exactly).find_all(_View(wanted, _exactly).text)


def _find_alike(text: str, wanted: str) -> list[tuple[int, int]]:
    view = _View(text, _alike)
    whole = _View(wanted + _END, _alike).text[: -len(_END)]
    bare = _LAST_BLANKS.sub("", whole)
    if not bare.strip():
        return []
    hits = view.find_all(whole)
    if bare != whole:
        # Blanks that end the wanted text are those at the end of a line, or they are meant.
        hits += [hit for hit in view.find_all(bare) if _LINE_END.match(text, hit[1])]
    return hits


class _View:
    """A text after normalisation that knows which stretch of the original each character came from."""

    def __init__(
        self, original: str, normalise: Callable[[str], list[tuple[str, int, int]]]
    ) -> None:
        if normalise is _exactly and "\r\n" not in original:
            # Nothing to normalise, and no list of a million numbers.
            self.text = original
            self._starts: Sequence[int] = range(len(original))
            self._ends: Sequence[int] = range(1, len(original) + 1)
            return
        starts: list[int] = []
        ends: list[int] = []
        signs: list[str] = []
        for piece, start, end in normalise(original):
            for sign in piece:
                signs.append(sign)
                starts.append(start)
                ends.append(end)
        self.text, self._starts, self._ends = "".join(signs), starts, ends

    def find_all(self, needle: str) -> list[tuple[int, int]]:
        """Return every match that begins and ends between characters of the original; overlaps count."""
        hits = []
        position = self.text.find(needle)
        while position >= 0:
            last = position + len(needle) - 1
            whole = (position == 0 or self._starts[position - 1] != self._starts[position]) and (
                last + 1 == len(self.text) or self._ends[last + 1] != self._ends[last]
            )
            if whole:
                hits.append((self._starts[position], self._ends[last]))
            position = self.text.find(needle, position + 1)
        return hits


def _exactly(text: str) -> list[tuple[str, int, int]]:
    """The text with CRLF read as LF."""
    pieces, position = [], 0
    while position < len(text):
        width = 2 if text.startswith("\r\n", position) else 1
        sign = "\n" if width == 2 else text[position]
        pieces.append((sign, position, position + width))
        position += width
    return pieces


def _alike(text: str) -> list[tuple[str, int, int]]:
    """The text with look-alikes made one, and without blanks at the ends of lines."""
    kept: list[tuple[str, int, int]] = []
    for start, end in _clusters(text):
        cluster = text[start:end]
        piece = unicodedata.normalize("NFKC", cluster).translate(_LOOKALIKES)
        if cluster in ("\n", "\r\n"):
            while kept and kept[-1][0].isspace() and kept[-1][0] != "\n":
                kept.pop()
            piece = "\n"
        elif len(piece) == 1 and unicodedata.category(piece) == "Zs":
            piece = " "
        kept.append((piece, start, end))
    while kept and kept[-1][0].isspace() and kept[-1][0] != "\n":
        kept.pop()
    return kept


def _clusters(text: str) -> list[tuple[int, int]]:
    """The stretches that NFKC treats together: a character and the marks that combine with it; CRLF."""
    spans: list[tuple[int, int]] = []
    for position, sign in enumerate(text):
        joins = unicodedata.combining(sign) or (
            sign == "\n" and text[position - 1 : position] == "\r"
        )
        if spans and joins:
            spans[-1] = (spans[-1][0], position + 1)
        else:
            spans.append((position, position + 1))
    return spans


def _to_lf(text: str) -> str:
    return text.replace("\r\n", "\n")


def _line_ending(text: str) -> str:
    first = text.find("\n")
    return "\r\n" if first > 0 and text[first - 1] == "\r" else "\n"


def _label(name: str, number: int, count: int) -> str:
    return f"edit {name}" if count == 1 else f"edit {name}, edits[{number - 1}]"
