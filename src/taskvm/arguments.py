"""Arguments of public calls, checked where only a type checker would have: many who call have none.

Rule: a wrong argument is a `UsageError` that names it, before anything starts; it is never dropped in silence.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from taskvm.errors import UsageError

# A variable-length limit of execve(2): the kernel refuses a single string of 128 KiB and more (MAX_ARG_STRLEN).
MAX_ARGUMENT_BYTES = 128 * 1024 - 1
MAX_SIGNAL = 64  # SIGRTMAX on Linux
# How much of a command an error repeats, in characters.
MAX_TOLD = 200

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def refuse_unknown(operation: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise UsageError for an argument of `**given` that does not exist: Python takes any."""
    names = sorted(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            advice = f"Did you mean {near[0]}?" if near else f"There are {', '.join(names)}"
            raise UsageError(operation, f"there is no argument {name!r}", advice)


def check_variables(variables: Mapping[str, str]) -> None:
    """Raise UsageError for a name or a value that no environment can hold."""
    for name, value in variables.items():
        if not isinstance(name, str) or not _VARIABLE.match(name):
            raise UsageError(
                f"set the variable {name!r}", "a name has letters, digits and _", "Rename it"
            )
        if not isinstance(value, str):
            kind = type(value).__name__
            raise UsageError(f"set the variable {name}", f"its value is a text, not of type {kind}")
        if "\0" in value:
            raise UsageError(f"set the variable {name}", "its value holds a NUL")


def check_kind(operation: str, name: str, value: object, kind: type, advice: str) -> None:
    """Raise UsageError for an argument of another type, which would be noticed late, or never."""
    if not isinstance(value, kind):
        raise UsageError(f"{operation} with {name}={value!r}", f"it is no {kind.__name__}", advice)


def check_stdin(stdin: object, iterable: str) -> None:
    """Raise UsageError for what no command can be fed; its pieces come from what has the method `iterable`."""
    if isinstance(stdin, str | bytes | None):
        return
    if isinstance(stdin, bytearray | memoryview) or not hasattr(stdin, iterable):
        what = "an asynchronous iterator" if iterable == "__aiter__" else "an iterator"
        raise UsageError(
            f"feed a command from a {type(stdin).__name__}",
            f"its stdin is a text, bytes, or {what} of bytes",
            "Pass bytes(stdin)" if not hasattr(stdin, "read") else "Pass stdin.read()",
        )


def check_signal(signal: object) -> None:
    """Raise UsageError for what is no signal of Linux; a guest's agent takes no other number."""
    if not isinstance(signal, int) or not 1 <= signal <= MAX_SIGNAL:
        raise UsageError(f"send the signal {signal!r}", f"it is no number of 1 … {MAX_SIGNAL}")


def check_number(operation: str, name: str, value: object, most: int) -> None:
    """Raise UsageError for what is no whole number of 0 … `most`."""
    if not isinstance(value, int) or not 0 <= value <= most:
        raise UsageError(operation, f"{name}={value!r} is no number of 0 … {most}")


def check_timeout(timeout_s: float | None) -> None:
    """Raise UsageError for a time that is over before it begins; NaN is one."""
    if timeout_s is not None and not timeout_s > 0:
        raise UsageError(
            f"run a command with timeout_s={timeout_s}",
            "it is not a positive number of seconds",
            "None is no limit",
        )


def read_command(command: str | Sequence[str], shell: str) -> list[str]:
    """Return the program and its arguments; a text is a line for `shell`. Raises UsageError."""
    if not isinstance(command, str | Sequence) or isinstance(command, bytes | bytearray):
        raise UsageError(
            f"run {command!r} in the guest",
            "it is neither a text nor a list of texts",
            'Write "ls -l" for the shell, or ["ls", "-l"] without one',
        )
    argv = [shell, "-c", command] if isinstance(command, str) else [str(item) for item in command]
    for item in () if isinstance(command, str) else command:
        if not isinstance(item, str | os.PathLike | int | float):  # bytes would become "b'…'"
            kind = type(item).__name__
            raise UsageError(
                f"run {command!r} in the guest", f"{item!r} is of the type {kind}", "Write texts"
            )
    if not argv or not argv[0] or any("\0" in item for item in argv):
        raise UsageError(
            f"run {command!r} in the guest", "it is empty or holds a NUL", "Pass a command"
        )
    if any(len(os.fsencode(item)) > MAX_ARGUMENT_BYTES for item in argv):
        raise UsageError(
            f"run {argv[0]!r} in the guest",
            f"an argument has more than {MAX_ARGUMENT_BYTES} bytes (MAX_ARG_STRLEN)",
            "Pass it through stdin or a file",
        )
    return argv


def tell_command(command: str | Sequence[str]) -> str:
    """Return a command as errors tell it."""
    return (command if isinstance(command, str) else shlex.join(map(str, command)))[:MAX_TOLD]
