"""taskfactory.agents.cutting: what a model reads of a long text."""

from hypothesis import given
from hypothesis import strategies as st

from taskfactory.agents.cutting import Cut, cut_head, cut_tail, size_text, split_lines


def test_a_short_text_is_not_cut() -> None:
    assert cut_head("a\nb\n") == Cut("a\nb", 2, 2)
    assert cut_tail("a\nb\n") == Cut("a\nb", 2, 2)


def test_the_head_is_cut_by_lines_or_bytes() -> None:
    assert cut_head("a\nb\nc", max_lines=2) == Cut("a\nb", 2, 3, "lines")
    assert cut_head("aa\nbb\ncc", max_bytes=5) == Cut("aa\nbb", 2, 3, "bytes")
    assert cut_head("aaaaaa\nb", max_bytes=5) == Cut("", 0, 2, "bytes")


def test_the_tail_is_cut_by_lines_or_bytes() -> None:
    assert cut_tail("a\nb\nc", max_lines=2) == Cut("b\nc", 2, 3, "lines")
    assert cut_tail("aa\nbb\ncc", max_bytes=5) == Cut("bb\ncc", 2, 3, "bytes")
    assert cut_tail("a\nbbbbbbbb", max_bytes=5) == Cut("bbbbb", 1, 2, "bytes")


@given(st.text(), st.integers(1, 20), st.integers(1, 40))
def test_no_cut_is_longer_than_its_limits(text: str, max_lines: int, max_bytes: int) -> None:
    for cut in (cut_head(text, max_lines, max_bytes), cut_tail(text, max_lines, max_bytes)):
        assert len(cut.text.encode("utf-8", "replace")) <= max_bytes
        assert cut.text.count("\n") < max_lines
        assert cut.by or cut.text == "\n".join(split_lines(text))


def test_sizes_are_for_people() -> None:
    assert (size_text(1), size_text(51200)) == ("1 bytes", "50.0 KB")
