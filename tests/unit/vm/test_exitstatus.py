"""What a supervisor's exit status says about QEMU. Covers taskvm.vm.exitstatus."""

import signal

import pytest

from taskvm.vm.exitstatus import explain_exit


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "QEMU exited: its guest turned itself off, or its kernel gave up"),
        (1, "QEMU exited with status 1"),
        (126, "QEMU did not run: it could not be confined"),
        (128 + signal.SIGABRT, "QEMU was ended by SIGABRT, sent by itself: a fault of QEMU's own"),
        (128 + signal.SIGTERM, "QEMU was ended by SIGTERM"),
        (128 + 100, "QEMU was ended by signal 100"),
        (-signal.SIGTERM, "QEMU's supervisor was ended by SIGTERM"),
    ],
)
def test_a_status_says_how_qemu_ended(status: int, words: str) -> None:
    assert explain_exit(status) == words


def test_every_status_has_words() -> None:
    """Also those that no QEMU exits with."""
    assert all(explain_exit(status).startswith("QEMU") for status in range(-256, 256))
