"""Cutting long text to what a model should read: whole lines, at most so many, at most so many bytes."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LINES = 2000
MAX_BYTES = 50 * 1024


@dataclass(frozen=True, slots=True)
class Cut:
    """A cut text. `lines` of `total_lines` lines are left; `by` says which limit was reached, "" for none."""

    text: str
    lines: int
    total_lines: int
    by: str = ""


def cut_head(text: str, max_lines: int = MAX_LINES, max_bytes: int = MAX_BYTES) -> Cut:
    """Keep the beginning. No line is cut: `lines` is 0 when the first alone is too long."""
    lines = split_lines(text)
    kept, size = 0, 0
    for line in lines[:max_lines]:
        size += len(line.encode("utf-8", "replace")) + (1 if kept else 0)
        if size > max_bytes:
            return Cut("\n".join(lines[:kept]), kept, len(lines), "bytes")
        kept += 1
    by = "lines" if kept < len(lines) else ""
    return Cut("\n".join(lines[:kept]), kept, len(lines), by)


def cut_tail(text: str, max_lines: int = MAX_LINES, max_bytes: int = MAX_BYTES) -> Cut:
    """Keep the end. Of a last line that is too long alone, its end is kept."""
    lines = split_lines(text)
    kept: list[str] = []
    size = 0
    for line in reversed(lines[-max_lines:]):
        data = line.encode("utf-8", "replace")
        size += len(data) + (1 if kept else 0)
        if size > max_bytes:
            if not kept:
                kept.append(data[-max_bytes:].decode("utf-8", "ignore"))
            return Cut("\n".join(reversed(kept)), len(kept), len(lines), "bytes")
        kept.append(line)
    by = "lines" if len(kept) < len(lines) else ""
    return Cut("\n".join(reversed(kept)), len(kept), len(lines), by)


def split_lines(text: str) -> list[str]:
    """Split at LF; a final LF ends the last line instead of beginning another."""
    lines = text.split("\n")
    if len(lines) > 1 and not lines[-1]:
        lines.pop()
    return lines


def size_text(size_bytes: int) -> str:
    """Return a size as a person reads it."""
    return f"{size_bytes} bytes" if size_bytes < 1024 else f"{size_bytes / 1024:.1f} KB"
