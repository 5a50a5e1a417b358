"""Patterns of paths (taskvm.egress.pathpattern): what they match, and which paths are refused as ambiguous."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.egress.pathpattern import AmbiguousPathError, PathPattern, plain_segments
from taskvm.errors import UsageError

PIECE = st.text("ab*", max_size=4).filter(lambda text: "**" not in text)
PATTERN = st.lists(PIECE | st.just("**"), min_size=1, max_size=4)
SEGMENTS = st.lists(st.text("ab", max_size=4), min_size=1, max_size=5)


def matches(pattern: str, path: str, *, generous: bool = False) -> bool:
    segments = plain_segments(path.encode())
    return PathPattern.parse(pattern).matches(segments, generous=generous)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("/", ["/", "/?q=1"], ["/a"]),
        ("/v1/models", ["/v1/models", "/v1/models?x=/../"], ["/v1/models/", "/v1", "/V1/models"]),
        ("/repos/*/issues", ["/repos/a/issues"], ["/repos/a/b/issues", "/repos/issues"]),
        ("/v1/**", ["/v1", "/v1/", "/v1/a/b"], ["/v1a", "/v2/v1"]),
        ("/**/refs", ["/refs", "/a/b/refs"], ["/refs/a", "/xrefs"]),
        ("/a*c/x", ["/ac/x", "/abc/x"], ["/ab/c/x", "/abcd/x"]),
        ("/**", ["/", "/a/b"], []),
    ],
)
def test_a_pattern_matches_whole_segments(
    pattern: str, matching: list[str], others: list[str]
) -> None:
    assert all(matches(pattern, path) for path in matching)
    assert not any(matches(pattern, path) for path in others)


def test_a_generous_match_ignores_case_and_a_final_slash() -> None:
    assert matches("/Admin", "/aDMIN/", generous=True)
    assert not matches("/admin", "/admin/x", generous=True)


@pytest.mark.parametrize(
    "target",
    [
        "", "*", "a", "/a/../b", "/..", "/a/.", "/./a", "//a", "/a//b", "/%2e%2e/a", "/a%2fb", "/a%2Fb",
        "/a%5cb", "/a\\b", "/a;b", "/a%3bb", "/%", "/%2", "/%zz", "/%2541", "/a%00", "/a%0a", "/%ff",
    ],
)  # fmt: skip
def test_an_ambiguous_path_is_refused(target: str) -> None:
    with pytest.raises(AmbiguousPathError):
        plain_segments(target.encode())


@pytest.mark.parametrize(
    "text", ["", "a", "/a/../b", "/a//b", "/a?b", "/a#b", "/a%2f", "/a**", "/**a/b", "/a b", "/a;b", "/\u00e9"]
)  # fmt: skip
def test_a_pattern_that_no_path_can_match_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="path pattern"):
        PathPattern.parse(text)


def test_a_hostile_path_takes_little_time() -> None:
    pattern = PathPattern.parse("/**/" + "/".join(["*a*b*c*d"] * 8) + "/**/x")

    before = time.process_time()
    assert not pattern.matches(["abcd" * 50 + "e"] * 200)
    assert time.process_time() - before < 5


@given(PATTERN, SEGMENTS)
def test_matching_is_that_of_a_regular_expression(pattern: list[str], segments: list[str]) -> None:
    expression = "".join(
        "(?:/[^/]*)*" if piece == "**" else "/" + piece.replace("*", "[^/]*") for piece in pattern
    )
    path = "/" + "/".join(segments)

    found = PathPattern(tuple(pattern)).matches(segments)

    assert found is (re.fullmatch(expression, path) is not None)


@given(st.binary(max_size=40))
def test_any_target_has_plain_segments_or_is_ambiguous(target: bytes) -> None:
    try:
        segments = plain_segments(b"/" + target)
    except AmbiguousPathError:
        return

    assert not {"..", "."} & set(segments)
    assert not any(sign in segment for segment in segments for sign in "/\\;%\0")
