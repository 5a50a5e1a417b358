"""Patterns of hosts and addresses (taskvm.egress.hostpattern): what they mean, and what is no pattern."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.egress.hostpattern import AddressRule, HostPattern
from taskvm.errors import UsageError

LABEL = st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True)
NAME = st.tuples(st.lists(LABEL, min_size=1, max_size=4).map(".".join), st.just("net")).map(
    ".".join
)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("example.com", ["example.com"], ["a.example.com", "xexample.com", "example.com.evil.net"]),
        ("*.example.com", ["a.example.com", "a.b.example.com"], ["example.com", "aexample.com"]),
        ("EXAMPLE.com.", ["example.com"], ["example.org"]),
        ("bücher.example", ["xn--bcher-kva.example"], ["bucher.example"]),
        ("10.0.0.0/8", ["10.1.2.3"], ["11.0.0.1", "example.com", "::1"]),
        ("2001:db8::/32", ["2001:db8::1"], ["2001:db9::1", "10.0.0.1"]),
        ("192.0.2.1", ["192.0.2.1"], ["192.0.2.2"]),
    ],
)
def test_a_pattern_matches_whole_labels(
    pattern: str, matching: list[str], others: list[str]
) -> None:
    parsed = HostPattern.parse(pattern)

    assert all(parsed.matches(host, 443) for host in matching)
    assert not any(parsed.matches(host, 443) for host in others)


def test_a_port_narrows_a_pattern() -> None:
    pattern = HostPattern.parse("[2001:db8::1]:8443")

    assert pattern.matches("2001:db8::1", 8443)
    assert pattern.matches("2001:db8::1")
    assert not pattern.matches("2001:db8::1", 443)


@pytest.mark.parametrize(
    "text",
    [
        "*", "*.com", "*.co.uk", "*.*.com", "*example.com", "ex*mple.com", "a.*.com", "**.a.com", ".example.com",
        "https://example.com", "example.com/path", "user@example.com", "example.com:", "example.com:99999",
        "example.com:*", "", " ", "a b.com", "127.1", "010.0.0.1", "0x7f000001", "2130706433", "10.0.0.1/8",
        "0.0.0.0/0", "::/0", "10.0.0.0/33", "fe80::1%eth0", "[example.com]:1", "straße.de",
        "exa。mple.com", "example.com:80:80", "a\0b.com", "*.10.0.0.1",
    ],
)  # fmt: skip
def test_a_pattern_that_cannot_be_meant_is_refused_with_help(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        HostPattern.parse(text)

    assert repr(text) in str(caught.value)
    assert "*.example.com" in caught.value.next_step


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("a.com", "a.com", True), ("a.com", "a.com:443", True), ("a.com:443", "a.com", False),
        ("*.a.com", "b.a.com", True), ("*.a.com", "a.com", False), ("*.a.com", "*.b.a.com", True),
        ("*.b.a.com", "*.a.com", False), ("a.com", "*.a.com", False), ("*.a.com", "*.a.com:1", True),
        ("10.0.0.0/8", "10.1.0.0/16", True), ("10.1.0.0/16", "10.0.0.0/8", False), ("10.0.0.0/8", "a.com", False),
        ("10.0.0.0/8", "::a00:1", False),
    ],
)  # fmt: skip
def test_covering_is_being_a_superset(outer: str, inner: str, expected: bool) -> None:
    assert HostPattern.parse(outer).covers(HostPattern.parse(inner)) is expected


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ("a.test", "a.test:443", True),
        ("a.test:443", "a.test:8443", False),
        ("a.sub.test", "*.sub.test:443", True),
        ("sub.test", "*.sub.test", False),
        ("*.a.sub.test", "*.sub.test:443", True),
        ("10.0.0.0/8:80", "10.1.0.0/16", True),
        ("10.0.0.0/16", "10.1.0.0/16", False),
    ],
)
def test_overlapping_is_having_something_in_common(one: str, two: str, expected: bool) -> None:
    first, second = HostPattern.parse(one), HostPattern.parse(two)

    assert first.overlaps(second) is second.overlaps(first) is expected


@pytest.mark.parametrize("text", ["a.com", "*", "10.0.0.1/8", "0.0.0.0/0", "127.0.0.1:0", ""])
def test_an_address_rule_is_an_address(text: str) -> None:
    with pytest.raises(UsageError, match="address"):
        AddressRule.parse(text)


@given(NAME)
def test_a_name_allows_itself_only(name: str) -> None:
    pattern = HostPattern.parse(name)

    assert pattern.matches(name)
    assert not pattern.matches("x" + name)
    assert not pattern.matches(name + ".com")
    assert not pattern.matches("x." + name)
    assert HostPattern.parse(f"*.{name}").matches("x." + name)
    assert not HostPattern.parse(f"*.{name}").matches("x" + name)


@given(st.text())
def test_any_text_is_a_pattern_or_a_usage_error(text: str) -> None:
    try:
        pattern = HostPattern.parse(text)
    except UsageError:
        return

    assert HostPattern.parse(str(pattern)) == pattern
    assert pattern.covers(pattern)
