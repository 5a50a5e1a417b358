"""taskvm.cli.detach: the keys that leave a command running."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm import UsageError
from taskvm.cli.detach import DEFAULT_KEYS, DetachKeys


def test_the_keys_of_docker_detach() -> None:
    """Ctrl-P Ctrl-Q, also when they come one by one; what was typed before them is passed on."""
    keys = DetachKeys.parse(DEFAULT_KEYS)

    assert keys.feed(b"ab\x10") == (b"ab", False)
    assert keys.feed(b"\x11") == (b"", True)


def test_half_a_sequence_is_keys_after_all() -> None:
    """What began like the sequence is passed on, in order, when something else follows."""
    keys = DetachKeys.parse("ctrl-p,ctrl-q")

    assert keys.feed(b"\x10") == (b"", False)
    assert keys.feed(b"x") == (b"\x10x", False)
    assert keys.feed(b"\x10\x10\x11") == (b"\x10", True)


def test_keys_that_are_held_back_can_be_released() -> None:
    """Nothing followed: they were for the command, and the sequence begins anew."""
    keys = DetachKeys.parse("ctrl-p,ctrl-q")
    keys.feed(b"\x10")

    assert keys.holds
    assert keys.release() == b"\x10"
    assert not keys.holds
    assert keys.feed(b"\x11") == (b"\x11", False)


@given(st.lists(st.binary(min_size=1, max_size=4)))
def test_no_keys_pass_everything(pieces: list[bytes]) -> None:
    keys = DetachKeys.parse("")

    assert [keys.feed(piece) for piece in pieces] == [(piece, False) for piece in pieces]


@given(st.lists(st.sampled_from(b"\x10\x11x"), max_size=30), st.integers(1, 5))
def test_nothing_typed_is_lost_or_reordered(typed: list[int], size: int) -> None:
    """However the keys are cut, what is passed and held back is what was typed up to the sequence."""
    data = bytes(typed)
    keys, passed = DetachKeys.parse("ctrl-p,ctrl-q"), b""

    for start in range(0, len(data), size):
        part, detached = keys.feed(data[start : start + size])
        passed += part
        if detached:
            break

    expected, found, _ = data.partition(b"\x10\x11")
    assert detached if found else not data or not detached
    assert passed == expected or (not found and passed + b"\x10" == expected)


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-p;q", "é", ",", "ctrl-1"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a key"):
        DetachKeys.parse(text)


def test_letters_and_signs_are_keys() -> None:
    assert DetachKeys.parse("ctrl-a,d").feed(b"\x01d") == (b"", True)
    assert DetachKeys.parse("ctrl-[,~").feed(b"\x1b~") == (b"", True)
