"""taskvm.fs.patterns: the syntax of .gitignore, with git itself as the judge."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taskvm.errors import UsageError
from taskvm.fs.patterns import Patterns


def hides(lines: list[str], path: str, *, directory: bool = False) -> bool:
    return Patterns(lines).hides(tuple(os.fsencode(path).split(b"/")), directory=directory)


@pytest.mark.parametrize(
    ("line", "hidden", "shown"),
    [
        (".env", [".env", "a/.env", ".env/x"], [".env.example", "x.env", "env"]),
        ("*.pem", ["k.pem", "a/b/k.pem", ".pem"], ["pem", "k.pem.txt"]),
        ("/secrets/", ["secrets/x"], ["a/secrets/x", "secrets"]),
        ("config/prod.key", ["config/prod.key"], ["a/config/prod.key", "prod.key"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["b", "x/a/b"]),
        ("**/keys/*", ["keys/a", "x/y/keys/a", "keys/a/b"], ["keys"]),
        ("private/**", ["private/a", "private/a/b"], ["private"]),
        ("id_[!p]*", ["id_rsa"], ["id_public", "id_"]),
        ("[[:digit:]a-c].k", ["1.k", "b.k"], ["d.k", "12.k"]),
        (r"\!important", ["!important"], ["important"]),
        (r"\#x", ["#x"], ["x"]),
        ("a?c", ["abc", "a\nc", "aéc"], ["ac", "a/c"]),
    ],
)
def test_what_a_line_means(line: str, hidden: list[str], shown: list[str]) -> None:
    assert [path for path in hidden if not hides([line], path)] == []
    assert [path for path in shown if hides([line], path)] == []


def test_the_last_line_that_matches_decides_but_nothing_returns_from_a_hidden_directory() -> None:
    lines = ["*.pem", "!public.pem", "/private/", "!/private/public.pem", "# comment", ""]

    assert hides(lines, "a/k.pem")
    assert not hides(lines, "a/public.pem")
    assert hides(lines, "private/public.pem")


@pytest.mark.parametrize(
    "path", [".ENV", ".Env", ".env.", ".env ", ".e\u200dnv", "a/.ENV", ".ENV/x", "\uff0eenv"]
)
def test_a_name_that_some_file_systems_take_for_a_hidden_one_is_hidden(path: str) -> None:
    assert hides([".env"], path)


def test_only_the_very_name_is_taken_back() -> None:
    lines = [".env*", "!.env.example"]

    assert not hides(lines, ".env.example")
    assert hides(lines, ".ENV.EXAMPLE")


@pytest.mark.parametrize("line", ["a[", "a\\", "a//b", "../x", "a/./b", "[z-a]", "[[:none:]]", "/"])
def test_a_line_that_could_never_match_is_a_mistake(line: str) -> None:
    with pytest.raises(UsageError, match="hide"):
        Patterns([line])


def test_one_text_is_not_a_list() -> None:
    with pytest.raises(UsageError, match="list"):
        Patterns(".env")


def test_no_name_makes_a_pattern_slow() -> None:
    """Exponential or polynomial matching of this would not end within the test's limit."""
    assert not hides(["*a*a*a*a*a*a*a*a*a*a*b"], "a" * 255)
    assert not hides(["**/**/**/a/**/**/**/b"], "/".join(["a"] * 500))


NAMES = st.sampled_from(["a", "b", "ab", "a.b", ".a", "abc", "!a", "#", "a b"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
PIECES = ["a", "b", "ab", "*", "?", "**", "[ab]", "[!a]", "a*", "*b", "\\a", "."]
SEGMENTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=2).map("".join)
LINES = st.builds(
    lambda negated, anchored, names, directory: negated + anchored + "/".join(names) + directory,
    st.sampled_from(["", "", "!"]),
    st.sampled_from(["", "/"]),
    st.lists(SEGMENTS, min_size=1, max_size=3),
    st.sampled_from(["", "", "/"]),
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", path], check=True)
    return path


@given(st.lists(LINES, min_size=1, max_size=3), st.lists(PATHS, min_size=4, max_size=4))
@example(["a/**", "!a/b"], ["a/b", "a", "a/c/d", "b/a"])
@example(["**/**"], ["a", "a/b", "b", "b/a"])
@example(["a/**/**/b"], ["a/b", "a", "a/c/b", "b/a"])
@example(["a", "/a**", "!a"], ["a/b", "a", "ab/c", "b/a"])
@example(["b/a**/c", "!a/**b"], ["b/a/c", "b/ab/x/c", "b/a", "a/b/ab"])
@example(["a", "/***", "!a"], ["a/b", "a", "ab/c", "b/a"])
@settings(max_examples=40)
def test_git_reads_every_list_alike(repository: Path, lines: list[str], paths: list[str]) -> None:
    try:
        Patterns(lines)
    except UsageError:
        return  # git ignores such lines without a word
    (repository / ".gitignore").write_text("\n".join(lines) + "\n")
    checked = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin", "-z"],
        cwd=repository,
        input="\0".join(paths) + "\0",
        capture_output=True,
        text=True,
        check=False,
    )

    # A name with more below it is a directory for git as well; none of the paths exists.
    ours = {path for path in paths if hides(lines, path)}
    assert ours == set(filter(None, checked.stdout.split("\0")))


def test_each_directory_on_the_way_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that goes ever deeper makes nobody look at all that is above again and again."""
    patterns, judged = Patterns(["/secrets/", "!/public/", "a/**/b"]), list[bytes]()
    means = patterns._means
    monkeypatch.setattr(
        patterns,
        "_means",
        lambda above, name, *, directory: (
            judged.append(name) or means(above, name, directory=directory)
        ),
    )
    path = tuple(b"%d" % number for number in range(500))

    for depth in range(1, 501):
        assert not patterns.hides(path[:depth], directory=True)

    assert len(judged) <= 2 * 500


def test_what_is_known_of_directories_is_bounded_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskvm.fs.patterns._DIRECTORIES_REMEMBERED", 10)
    patterns = Patterns(["/secrets/", "a/**/keys/"])

    for number in range(100):
        name = b"%d" % number
        assert patterns.hides((b"secrets", name, b"x", b"y"), directory=False)
        assert patterns.hides((b"a", name, b"keys", b"y"), directory=False)
        assert not patterns.hides((b"a", name, b"y"), directory=False)
        assert patterns.hides((*(b"a",) * 50, name, b"keys"), directory=True)
        assert patterns._remembered <= 10
