"""taskfactory.agents.editing: replacing remembered text and nothing else."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from taskfactory.agents.editing import Replacement, apply_edits
from taskfactory.errors import ToolError


def edit(text: str, *pairs: tuple[str, str]) -> str:
    return apply_edits(text, [Replacement(old, new) for old, new in pairs], "f").text


def test_an_exact_match_is_replaced() -> None:
    edited = apply_edits("a\nb\nc\n", [Replacement("b\n", "B\nB2\n")], "f")

    assert edited.text == "a\nB\nB2\nc\n"
    assert edited.first_changed_line == 2
    assert "-b\n+B\n+B2" in edited.diff


def test_edits_are_looked_up_in_the_original() -> None:
    assert edit("one two", ("one", "two"), ("two", "one")) == "two one"


@pytest.mark.parametrize(
    ("text", "pairs", "says"),
    [
        ("a a", [("a", "b")], "occurs 2 times"),
        ("aaa", [("aa", "b")], "occurs 2 times"),
        ("a", [("x", "b")], "not in the file"),
        ("a", [("", "b")], "empty"),
        ("a", [("a", "a")], "nothing was changed"),
        ("abc", [("ab", "x"), ("bc", "y")], "overlap"),
        ("abc", [], "nothing to replace"),
        ("a b", [("a", "x"), ("c", "y")], r"edits\[1\]"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused(
    text: str, pairs: list[tuple[str, str]], says: str
) -> None:
    with pytest.raises(ToolError, match=says):
        edit(text, *pairs)


def test_the_byte_order_mark_and_crlf_stay() -> None:
    assert edit("\ufeffa\r\nb\r\nc", ("a\nb", "x\ny")) == "\ufeffx\r\ny\r\nc"


def test_lines_that_are_not_touched_keep_their_odd_endings() -> None:
    assert edit("a\r\nb\nc\r\n", ("b", "x")) == "a\r\nx\nc\r\n"


@pytest.mark.parametrize(
    ("text", "old"),
    [
        ("say \u201chello\u201d\n", 'say "hello"'),
        ("it\u2019s", "it's"),
        ("a \u2014 b", "a - b"),
        ("a\u00a0b", "a b"),
        ("x = 1  \ny = 2\t\nz", "x = 1\ny = 2\nz"),
        ("\ufb01le", "file"),
        ("cafe\u0301", "caf\u00e9"),
    ],
)
def test_look_alikes_match_when_nothing_else_does(text: str, old: str) -> None:
    assert edit(text, (old, "NEW")).rstrip("\n") == "NEW"


def test_an_exact_match_wins_over_look_alikes() -> None:
    assert edit('\u201ca\u201d "a"', ('"a"', "x")) == "\u201ca\u201d x"


def test_a_look_alike_match_changes_only_what_it_matched() -> None:
    text = "keep\u00a0\u201cthis\u201d  \nchange \u2018that\u2019\nkeep\u2014too \n"

    assert (
        edit(text, ("change 'that'", "done"))
        == "keep\u00a0\u201cthis\u201d  \ndone\nkeep\u2014too \n"
    )


@pytest.mark.parametrize(
    ("text", "old"),
    [
        ("x = 10", "x = 1 "),
        ("x = 1 + 1", "x = 1  "),
        ("a\nbc", "a\nb\t"),
        ("\u201ca\u201db", '"a" '),
    ],
)
def test_blanks_that_end_the_old_text_are_no_letters(text: str, old: str) -> None:
    """They may stand for none at the end of a line, never in the middle of a word."""
    with pytest.raises(ToolError, match="not in the file"):
        edit(text, (old, "NEW"))


@pytest.mark.parametrize(
    ("text", "old", "edited"),
    [
        ("x = 1\ny", "x = 1 ", "NEW\ny"),
        ("x = 1\t\ny", "x = 1  ", "NEW\t\ny"),
        ("x = 10\nx = 1", "x = 1 ", "x = 10\nNEW"),
        ("it\u2019s here", "it's ", "NEWhere"),
        ("a\u2014\n    b", "a-\n  ", "NEW  b"),
    ],
)
def test_blanks_that_end_the_old_text_match_blanks_or_a_lines_end(
    text: str, old: str, edited: str
) -> None:
    assert edit(text, (old, "NEW")) == edited


def test_half_a_ligature_is_no_match() -> None:
    with pytest.raises(ToolError, match="not in the file"):
        edit("\ufb01le", ("ile", "x"))


@given(st.text(max_size=60), st.integers(0, 60), st.integers(1, 60), st.text(max_size=10))
def test_an_edit_changes_the_match_and_nothing_else(
    text: str, start: int, length: int, new: str
) -> None:
    old = text[start : start + length]
    assume(old and "\r" not in text + new and old != new and not text.startswith("\ufeff"))
    assume(
        text.find(old) == start and text.find(old, start + 1) < 0 and not old.startswith("\ufeff")
    )

    assert edit(text, (old, new)) == text[:start] + new + text[start + length :]


@given(st.text(max_size=80), st.text(min_size=1, max_size=10))
def test_any_edit_succeeds_or_says_why_not(text: str, old: str) -> None:
    try:
        changed = edit(text, (old, "!"))
    except ToolError as error:
        changed = str(error)

    assert changed


def test_a_diff_has_the_line_numbers_of_the_file() -> None:
    text = "".join(f"{n}\n" for n in range(1, 101))

    edited = apply_edits(text, [Replacement("50\n", "fifty\n"), Replacement("52\n", "")], "f")

    assert edited.first_changed_line == 50
    assert edited.diff.split("\n")[2:] == [
        "@@ -47,9 +47,8 @@",
        *(" 47", " 48", " 49", "-50", "+fifty", " 51", "-52", " 53", " 54", " 55"),
    ]


def test_a_diff_that_nobody_would_read_is_left_out() -> None:
    text = "first\n" + "same\n" * 5000 + "last\n"

    edited = apply_edits(text, [Replacement("first", "1st"), Replacement("last", "end")], "f")

    assert (edited.diff, edited.first_changed_line) == ("", 1)
