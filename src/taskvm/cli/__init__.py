"""The command line: a thin shell over the public names of the package, one module for each group of commands."""

from __future__ import annotations

import signal

__all__ = ["main"]


def main() -> None:
    """Be the program `taskvm`."""
    handled = signal.getsignal(signal.SIGINT)
    # Ctrl-C before there is anything to release ends us as any program, and not with a traceback out of an import.
    if (
        handled is signal.default_int_handler
    ):  # who started us may have it ignored, as `command &` of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from taskvm.cli.commands import main as commands

    signal.signal(signal.SIGINT, handled)
    commands()
