"""How QEMU ended, in words: what its supervisor's exit status says (confine/confine.c). Pure.

Refuses to guess: a signal's sender is not known, so the likely ones are named.
"""

from __future__ import annotations

import signal

# The supervisor exits with the program's status, or 128 + its signal; it keeps three for itself.
_BY_SIGNAL = 128
_SUPERVISOR = {
    125: "its supervisor was given bad options",
    126: "it could not be confined",
    127: "it could not be executed",
}
_LIKELY = {
    signal.SIGKILL: "somebody, or the kernel for want of memory",
    signal.SIGBUS: "the kernel: the disk of its memory file is full or fails",
    signal.SIGABRT: "itself: a fault of QEMU's own",
    # Also what abort() becomes: the kernel drops signals that a namespace's first process sends itself.
    signal.SIGSEGV: "the kernel: a fault of QEMU's own",
    signal.SIGSYS: "its system call filter",
}


def explain_exit(status: int) -> str:
    """Return how the QEMU ended whose supervisor exited with `status`; negative is a signal to the supervisor itself.

    >>> explain_exit(134)
    'QEMU was ended by SIGABRT, sent by itself: a fault of QEMU's own'
    """
    if status == 0:
        return "QEMU exited: its guest turned itself off, or its kernel gave up"
    if status in _SUPERVISOR:
        return f"QEMU did not run: {_SUPERVISOR[status]}"
    who = "QEMU's supervisor" if status < 0 else "QEMU"
    if 0 < status < _BY_SIGNAL:
        return f"{who} exited with status {status}"
    number = -status if status < 0 else status - _BY_SIGNAL
    try:
        name = signal.Signals(number)
    except ValueError:
        return f"{who} was ended by signal {number}"
    likely = f", sent by {_LIKELY[name]}" if name in _LIKELY else ""
    return f"{who} was ended by {name.name}{likely}"
