"""Text of a guest on a person's terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` with whatever a terminal might act on, or cannot show, escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )
