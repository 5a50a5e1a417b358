"""A program that prints a secret's value: `gh auth token`, a password manager, a token broker."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence

from taskvm.egress.secret import MAX_VALUE
from taskvm.errors import UsageError

TIMEOUT_S = 30.0  # a password manager may ask its user


def command_output(argv: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> Callable[[], str]:
    """Return a callback for `Secret.from_callback` that runs a program of this host for its output.

    One newline at its end is dropped. The callback raises UsageError when the program cannot be
    started, fails or takes too long; nothing that it wrote is in the message.
    """
    command = tuple(argv)
    operation = f"run {shlex.join(command)[:200]} for a secret's value"

    def run() -> str:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=timeout_s, check=False
            )  # fmt: skip
        except OSError as error:
            raise UsageError(operation, error.strerror or "it cannot be started") from error
        except subprocess.TimeoutExpired:
            # `from None`: the error carries the output.
            raise UsageError(operation, f"it did not end in {timeout_s:g} s") from None
        if done.returncode:
            raise UsageError(operation, f"it ended with status {done.returncode}")
        if len(done.stdout) > MAX_VALUE + 2:
            raise UsageError(operation, f"it wrote more than {MAX_VALUE} bytes")
        try:
            text = done.stdout.decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError(operation, "its output is not UTF-8 text") from None
        return text.removesuffix("\n").removesuffix("\r")

    return run
