"""taskvm.progress: a start that takes a minute says why, to a person."""

import io
import os
import sys

import pytest

from taskvm.progress import tell_terminal


def test_a_terminal_is_told() -> None:
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        tell_terminal("building the image")
        told = b""
        while not told.endswith(b"\n"):  # a terminal hands on what it has by now
            told += os.read(leader, 100)
    os.close(leader)

    assert told == b"taskvm: building the image\r\n"


def test_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a file nor a pipe, whose reader did not ask for it; and there may be no standard error at all."""
    file = io.StringIO()
    closed = io.StringIO()
    closed.close()
    for stream in (file, closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        tell_terminal("building the image")

    assert file.getvalue() == ""
