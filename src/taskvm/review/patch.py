"""A change of one file as text: git's extended unified format (git-diff(1), "Generating patch text with -p").

Pure. Both sides may be hostile and large, so nothing here is quadratic: lines that occur once on either side anchor
the comparison (patience diff), and only small gaps between them are compared line by line.
"""

from __future__ import annotations

import base64
import bisect
import difflib
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

# A text that nobody reads to its end; also the largest file that is compared.
MAX_DIFF_BYTES = 8 * 1024 * 1024
CONTEXT_LINES = 3
# Lines of one side times lines of the other that are compared each with each: milliseconds.
_SMALL = 40_000
_MAX_DEPTH = 12
_LINK_MODE = 0o120000
_NO_OBJECT = "0" * 40
_BINARY_LINE_BYTES = 52
_PLAIN = frozenset(map(chr, range(0x21, 0x7F))) - {'"', "\\"}

# (first line of the old, of the new, how many): lines that stay.
Match = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Version:
    """One side: git's mode, and the content; None for one that is too large to compare."""

    mode: int
    content: bytes | None


def render_patch(path: str, old: Version | None, new: Version | None, *, binary: bool) -> str:
    """Return the patch that makes `old` into `new`, "" when there is nothing that git knows of (directories)."""
    if old is None and new is None:
        return ""
    if old and new and _LINK_MODE in (old.mode, new.mode) and old.mode != new.mode:
        # git shows a change of type as two.
        parts = (
            render_patch(path, old, None, binary=binary),
            render_patch(path, None, new, binary=binary),
        )
        return "".join(parts)
    names = _quoted(f"a/{path}"), _quoted(f"b/{path}")
    head = f"diff --git {names[0]} {names[1]}\n" + "".join(_mode_lines(old, new))
    before = b"" if old is None else old.content
    after = b"" if new is None else new.content
    shown = (names[0] if old else "/dev/null", names[1] if new else "/dev/null")
    if before is not None and before == after:
        return head
    if before is None or after is None or (not binary and _is_binary(before, after)):
        return head + f"Binary files {shown[0]} and {shown[1]} differ\n"
    if _is_binary(before, after):
        ids = (_object(before) if old else _NO_OBJECT, _object(after) if new else _NO_OBJECT)
        return head + f"index {ids[0]}..{ids[1]}\n" + _binary_patch(before, after)
    text = f"--- {shown[0]}\n+++ {shown[1]}\n" + "".join(_hunks(_lines(before), _lines(after)))
    return head + text


def _mode_lines(old: Version | None, new: Version | None) -> Iterator[str]:
    if old is None and new is not None:
        yield f"new file mode {new.mode:06o}\n"
    elif new is None and old is not None:
        yield f"deleted file mode {old.mode:06o}\n"
    elif old is not None and new is not None and old.mode != new.mode:
        yield f"old mode {old.mode:06o}\nnew mode {new.mode:06o}\n"


def _quoted(name: str) -> str:
    """Return a name as git writes it: in quotes, with escapes, when it has anything unusual."""
    if all(char in _PLAIN or char == " " for char in name):
        return name if " " not in name else f'"{name}"'
    text = "".join(
        chr(byte) if chr(byte) in _PLAIN or byte == 0x20 else f"\\{byte:03o}"
        for byte in name.encode("utf-8", "surrogateescape")
    )
    return f'"{text}"'


# Text...


def _lines(content: bytes) -> list[bytes]:
    lines = content.split(b"\n")
    last = lines.pop()
    return [line + b"\n" for line in lines] + ([last] if last else [])


def _hunks(old: Sequence[bytes], new: Sequence[bytes]) -> Iterator[str]:
    for group in _groups(_changed(old, new)):
        first, last = group[0], group[-1]
        before, after = min(CONTEXT_LINES, first[0]), min(CONTEXT_LINES, len(old) - last[1])
        i1, i2 = first[0] - before, last[1] + after
        j1, j2 = first[2] - before, last[3] + after
        yield f"@@ -{_range(i1, i2)} +{_range(j1, j2)} @@\n"
        place = i1
        for a1, a2, b1, b2 in group:
            yield from _marked(" ", old[place:a1])
            yield from _marked("-", old[a1:a2])
            yield from _marked("+", new[b1:b2])
            place = a2
        yield from _marked(" ", old[place:i2])


def _marked(mark: str, lines: Sequence[bytes]) -> Iterator[str]:
    for line in lines:
        text = line.decode("utf-8", "surrogateescape")
        yield (
            f"{mark}{text}"
            if line.endswith(b"\n")
            else f"{mark}{text}\n\\ No newline at end of file\n"
        )


def _range(start: int, end: int) -> str:
    length = end - start
    first = start + 1 if length else start
    return str(first) if length == 1 else f"{first},{length}"


Block = tuple[int, int, int, int]  # old[i1:i2] became new[j1:j2]


def _changed(old: Sequence[bytes], new: Sequence[bytes]) -> list[Block]:
    ends: list[Match] = [(len(old), len(new), 0)]
    blocks: list[Block] = []
    i = j = 0
    for a, b, size in [*_matches(old, new, (0, len(old), 0, len(new)), 0), *ends]:
        if i < a or j < b:
            blocks.append((i, a, j, b))
        i, j = a + size, b + size
    return blocks


def _groups(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Put blocks together whose contexts would meet."""
    group: list[Block] = []
    for block in blocks:
        if group and block[0] - group[-1][1] > 2 * CONTEXT_LINES:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def _matches(
    old: Sequence[bytes], new: Sequence[bytes], block: Block, depth: int
) -> Iterator[Match]:
    """Yield what stays within `block`, in order."""
    i1, i2, j1, j2 = block
    head = 0
    while i1 + head < i2 and j1 + head < j2 and old[i1 + head] == new[j1 + head]:
        head += 1
    if head:
        yield i1, j1, head
    i1, j1 = i1 + head, j1 + head
    tail = 0
    while i1 < i2 - tail and j1 < j2 - tail and old[i2 - tail - 1] == new[j2 - tail - 1]:
        tail += 1
    i2, j2 = i2 - tail, j2 - tail
    if i1 < i2 and j1 < j2:
        yield from _between(old, new, (i1, i2, j1, j2), depth)
    if tail:
        yield i2, j2, tail


def _between(
    old: Sequence[bytes], new: Sequence[bytes], block: Block, depth: int
) -> Iterator[Match]:
    i1, i2, j1, j2 = block
    if (i2 - i1) * (j2 - j1) <= _SMALL:
        matcher = difflib.SequenceMatcher(None, old[i1:i2], new[j1:j2], autojunk=False)
        yield from ((i1 + a, j1 + b, size) for a, b, size in matcher.get_matching_blocks() if size)
        return
    anchors = _anchors(old, new, block) if depth < _MAX_DEPTH else []
    if not anchors:
        return  # shown as replaced
    fences = [(i1 - 1, j1 - 1), *anchors, (i2, j2)]
    for (a, b), (next_a, next_b) in pairwise(fences):
        yield from _matches(old, new, (a + 1, next_a, b + 1, next_b), depth + 1)
        if next_a < i2:
            yield next_a, next_b, 1


def _anchors(old: Sequence[bytes], new: Sequence[bytes], block: Block) -> list[tuple[int, int]]:
    """Return the longest rising run of lines that occur once on each side: patience sorting."""
    i1, i2, j1, j2 = block
    counts, others = Counter(old[i1:i2]), Counter(new[j1:j2])
    places = {new[j]: j for j in range(j1, j2)}
    pairs = [(i, places[old[i]]) for i in range(i1, i2) if counts[old[i]] == 1 == others[old[i]]]
    tops: list[int] = []
    piles: list[int] = []  # of the pair on top of each pile
    before: list[int] = []  # of each pair, the pair on top of the pile to its left, or -1
    for number, (_, j) in enumerate(pairs):
        pile = bisect.bisect_left(tops, j)
        before.append(piles[pile - 1] if pile else -1)
        tops[pile : pile + 1] = [j]
        piles[pile : pile + 1] = [number]
    run = []
    number = piles[-1] if piles else -1
    while number >= 0:
        run.append(pairs[number])
        number = before[number]
    return run[::-1]


# Bytes (git's apply.c, parse_binary_hunk)...


def _is_binary(before: bytes, after: bytes) -> bool:
    return b"\0" in before or b"\0" in after


def _object(content: bytes) -> str:
    head = f"blob {len(content)}\0".encode()
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()


def _binary_patch(before: bytes, after: bytes) -> str:
    return "GIT binary patch\n" + "".join((*_literal(after), "\n", *_literal(before), "\n"))


def _literal(content: bytes) -> Iterator[str]:
    yield f"literal {len(content)}\n"
    packed = zlib.compress(content)
    for start in range(0, len(packed), _BINARY_LINE_BYTES):
        piece = packed[start : start + _BINARY_LINE_BYTES]
        size = len(piece)
        mark = chr(ord("A") + size - 1) if size <= 26 else chr(ord("a") + size - 27)
        yield mark + base64.b85encode(piece, pad=True).decode() + "\n"
