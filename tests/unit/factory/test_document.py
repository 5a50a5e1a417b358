"""taskfactory.document: YAML and JSON with line numbers, bounded."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taskfactory.document import MAX_BYTES, parse_document, read_document
from taskfactory.errors import ConfigError


def test_words_and_times_stay_as_they_are_written() -> None:
    text = "%YAML 1.1\n---\na: no\nb: 2026-02-22T20:15:03.412Z\nc: 2026-02-22\nd: 1:30\ne: 0x10\nf: true\n"

    assert parse_document(text, "x").data == {
        "a": "no",
        "b": "2026-02-22T20:15:03.412Z",
        "c": "2026-02-22",
        "d": "1:30",
        "e": 16,
        "f": True,
    }


def test_values_are_plain_python() -> None:
    data = parse_document(
        "a: &x {k: 'q', n: 10}\nt: |\n  line\nb: 1.5\nc: [yes, true]\nd: *x\n", "x"
    ).mapping()

    assert data == {
        "a": {"k": "q", "n": 10},
        "t": "line\n",
        "b": 1.5,
        "c": ["yes", True],
        "d": {"k": "q", "n": 10},
    }
    assert {type(value) for value in data.values()} == {dict, str, float, list}


def test_keys_and_items_know_their_lines() -> None:
    document = parse_document("a:\n  b: 1\n  c:\n    - x\n    - y\n", "f.yaml", first_line=10)

    assert document.where(("a", "b")) == "f.yaml:11"
    assert document.where(("a", "c", 1)) == "f.yaml:14"
    assert document.where(("a", "missing")) == "f.yaml:10"


def test_tabs_may_indent_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{\n\t"a": [\n\t\t1\n\t]\n}\n')

    assert read_document(path).data == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\na: 2\n", 2),
        ("a: [1\n", 2),
        ("a: !!python/object:os.system x\n", 1),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(ConfigError, match=rf"^f:{line}: "):
        parse_document(text, "f")


def test_aliases_cannot_explode() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]

    with pytest.raises(ConfigError, match="aliases count"):
        parse_document("\n".join(lines), "f")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ConfigError):
        parse_document("[" * 100_000, "f")
    with pytest.raises(ConfigError):
        parse_document("[" * 100 + "]" * 100, "f")


def test_a_large_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))

    with pytest.raises(ConfigError, match="more than"):
        read_document(path)


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: \xff")

    with pytest.raises(ConfigError, match="byte 3 is not UTF-8"):
        read_document(path)


TOKENS = [
    *(
        "a",
        "b",
        ":",
        " ",
        "\n",
        "- ",
        "? ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "&a ",
        "*a",
        "!!set ",
        "!!int ",
    ),
    *(
        "!!omap ",
        "!x ",
        "|\n  x\n",
        ">\n",
        "'",
        '"',
        "#",
        "%TAG ! x\n",
        "---\n",
        "...\n",
        "<<: *a\n",
    ),
    *(
        "0x",
        "1e5",
        "~",
        "null",
        "true",
        "12:30",
        "2020-01-01",
        "\t",
        "=",
        "\u2028",
        "@",
        "0o8",
        ".inf",
    ),
]


@given(st.text(max_size=200) | st.lists(st.sampled_from(TOKENS), max_size=14).map("".join))
@settings(max_examples=500)
@example("? &0 \u2028<<: *0")  # a mapping that is merged into itself before it is there
def test_any_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    refused = None
    try:
        document = parse_document(text, "f")
    except ConfigError as error:
        refused = error.problems

    assert refused or document.name == "f"
