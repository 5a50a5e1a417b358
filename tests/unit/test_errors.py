"""What errors say, to people and to programs."""

import pickle

import pytest

from taskvm.errors import CommandError, CopyError, GuestError, TaskvmError
from taskvm.process import ExecResult

# Sets the clipboard of many terminals; turns the order of signs; no sign at all (a byte that is not UTF-8).
ATTACK = "\x1b]52;c;cm0gLXJmIH4=\x07 \u202egnp.txt \udcff \x9b2J"


@pytest.mark.parametrize(
    "error",
    [
        CommandError(
            "make", ExecResult(exit_code=1, stderr_bytes=ATTACK.encode("utf-8", "replace"))
        ),
        GuestError(f"read /tmp/tree/{ATTACK}", 13, "open"),
        CopyError("copy", "it cannot be", ATTACK),
    ],
)
def test_no_message_acts_on_a_terminal(error: TaskvmError) -> None:
    """Lines stay lines; what the guest chose is there to be read, and the parts are as they were."""
    text = str(error)

    assert all(sign.isprintable() for sign in text)
    assert "\\x1b]52;c;cm0gLXJmIH4=\\x07" in text
    assert "\x1b" in f"{error.operation}{error.cause}{error.next_step}"
    assert str(pickle.loads(pickle.dumps(error))) == text


def test_a_message_keeps_its_lines() -> None:
    assert str(TaskvmError("boot", "the console said:\n  panic\tnow")) == (
        "boot: the console said:\n  panic\\tnow"
    )
