"""Replacing texts in a stream (taskvm.egress.replacing): no cut makes a difference."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.egress.replacing import Replacer

# Few letters: texts that begin, contain and repeat one another.
TEXTS = st.lists(st.text("ab", min_size=1, max_size=5).map(str.encode), max_size=4, unique=True)
PIECES = st.lists(st.text("abc", max_size=6).map(str.encode), max_size=8)


def upper(text: bytes) -> bytes:
    return b"<" + text.upper() + b"aa>"


@given(TEXTS, PIECES)
def test_the_result_is_that_of_one_pass_over_the_whole(
    texts: list[bytes], pieces: list[bytes]
) -> None:
    ordered = sorted(texts, key=len, reverse=True)
    expected = re.sub(
        b"|".join(ordered) or b"(?!)", lambda match: upper(match.group()), b"".join(pieces)
    )

    replacer = Replacer(texts, upper)

    assert b"".join(map(replacer.feed, pieces)) + replacer.finish() == expected


@given(TEXTS, PIECES)
def test_only_the_beginning_of_a_text_is_held_back(texts: list[bytes], pieces: list[bytes]) -> None:
    replacer = Replacer(texts, bytes)
    fed = sent = b""
    for piece in pieces:
        fed += piece
        sent += replacer.feed(piece)

        held = fed[len(sent) :]
        assert fed.startswith(sent)
        assert (
            not held
            or any(text.startswith(held) and text != held for text in texts)
            or any(text.startswith(held) for text in texts)
        )


def test_what_the_replacement_raises_goes_through() -> None:
    def refuse(text: bytes) -> bytes:
        raise ValueError(len(text))

    replacer = Replacer([b"secret"], refuse)

    assert replacer.feed(b"a sec") == b"a "
    with pytest.raises(ValueError, match="6"):
        replacer.feed(b"ret")


def test_long_texts_and_large_pieces_take_little_time() -> None:
    replacer = Replacer([b"a" * 16_000 + b"b", b"a" * 15_000 + b"c"], upper)

    out = replacer.feed(b"x" * 1_000_000) + replacer.feed(b"ax" * 100_000) + replacer.finish()

    assert len(out) == 1_200_000
