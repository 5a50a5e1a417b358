"""taskvm.printing: a guest's text acts on no terminal."""

import pytest

from taskvm import UsageError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("grün.py", "grün.py"),
        ("\x1b[2J\r\n", "\\x1b[2J\\r\\n"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\udc80", "\\udc80"),
    ],
)
def test_what_a_terminal_could_act_on_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_an_error_keeps_its_lines_and_escapes_the_rest() -> None:
    assert str(UsageError("read x", "one\ntwo\x1b[2J")) == "read x: one\ntwo\\x1b[2J"
