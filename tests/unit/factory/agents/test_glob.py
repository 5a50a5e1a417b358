"""taskfactory.agents.glob: patterns for paths."""

import time

import pytest

from taskfactory.agents.glob import compile_glob


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*.py", "a.py", True),
        ("*.py", "src/deep/a.py", True),
        ("*.py", "a.pyc", False),
        ("src/*.py", "src/a.py", True),
        ("src/*.py", "src/deep/a.py", False),
        ("src/**/*.py", "src/a.py", True),
        ("src/**/*.py", "src/x/y/a.py", True),
        ("**/a.py", "a.py", True),
        ("**/x/**", "q/x/r/s", True),
        ("src/**", "src/a/b", True),
        ("src/**", "src", False),
        ("*.{ts,tsx}", "a/b.tsx", True),
        ("{a,b{c,d}}.txt", "bd.txt", True),
        ("{a.txt", "{a.txt", True),
        ("a?c", "abc", True),
        ("a?c", "ac", False),
        ("[ab].c", "b.c", True),
        ("[!ab].c", "b.c", False),
        (".*", ".env", True),
        ("A.py", "a.py", False),
    ],
)
def test_a_pattern_matches_what_it_says(pattern: str, path: str, matches: bool) -> None:
    assert compile_glob(pattern)(path) is matches


@pytest.mark.parametrize("pattern", ["x" * 1001, "{a,b}" * 10])
def test_a_pattern_that_is_too_much_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="more than"):
        compile_glob(pattern)


@pytest.mark.parametrize("pattern", ["*a" * 100 + "b", "**/" * 100 + "b", "*a*a*a/" * 50 + "b"])
def test_no_pattern_takes_long_on_any_name(pattern: str) -> None:
    matches = compile_glob(pattern)
    started = time.process_time()

    assert not matches("/".join(["a" * 255] * 15))
    assert time.process_time() - started < 5  # backtracking: for ever
