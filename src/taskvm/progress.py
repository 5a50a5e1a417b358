"""What is told while something takes long: an image is built, a guest boots to be started from later."""

from __future__ import annotations

import sys


def tell_terminal(line: str) -> None:
    """Write `line` to standard error when that is a terminal, so that a minute of work is not taken for a hang."""
    try:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"taskvm: {line}\n")
            sys.stderr.flush()
    except (OSError, ValueError):
        return  # it is closed, or hung up: the work goes on
