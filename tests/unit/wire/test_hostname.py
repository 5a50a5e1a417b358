"""Host names: one canonical text for one name, and nothing that a resolver could read as something else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.wire.hostname import (
    HostNameError,
    parse_authority,
    parse_host,
    parse_hostname,
    render_authority,
)

LABEL = st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,20}[a-z0-9_])?", fullmatch=True)
NAME = st.lists(LABEL, min_size=1, max_size=4).map(".".join)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("_srv._tcp.example.com", "_srv._tcp.example.com"),
        ("xn--bcher-kva.de", "xn--bcher-kva.de"),
        ("1password.com", "1password.com"),
        ("a" * 63 + ".de", "a" * 63 + ".de"),
    ],
)
def test_a_name_has_one_spelling(text: str, canonical: str) -> None:
    assert parse_hostname(text) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "..", "a..b", ".a.com", "a.com..", "-a.com", "a-.com", "a b.com", "a\0.com", "a.com\n",
        "a/b", "a@b", "a%00b", "127.0.0.1", "127.1", "2130706433", "0x7f.1", "0x7f000001", "a.0x", "1.2.3.4.",
        "bücher.de", "a。b", "\uff41.com", "xn--", "xn--abc-", "xn--999999999", "a" * 64 + ".de",
        "a." * 126 + "aa", "*", "*.com", "[::1]", "::1",
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(HostNameError):
        parse_hostname(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.com", ("a.com", 80)),
        ("A.com.:8080", ("a.com", 8080)),
        ("[::1]", ("::1", 80)),
        ("[2001:DB8::1]:443", ("2001:db8::1", 443)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
    ],
)
def test_an_authority_is_a_host_and_a_port(text: str, expected: tuple[str, int]) -> None:
    assert parse_authority(text, 80) == expected


@pytest.mark.parametrize(
    "text",
    ["a.com:", "a.com:0", "a.com:65536", "a.com:+80", "a.com:\uff18\uff10", "a.com:80:80", "u@a.com", "::1", "::1:80",
     "[::1", "::1]", "[a.com]", "[a.com]:80", "[::1%eth0]", "[10.0.0.1]", ":80", ""],
)  # fmt: skip
def test_an_authority_with_two_readings_is_refused(text: str) -> None:
    with pytest.raises(HostNameError):
        parse_authority(text, 80)


@given(NAME, st.integers(1, 65535))
def test_an_authority_survives_writing_and_reading(name: str, port: int) -> None:
    try:
        host = parse_hostname(name)
    except HostNameError:
        return

    assert parse_authority(render_authority(host, port, 443), 443) == (host, port)
    assert parse_hostname(host) == host


@given(st.text())
def test_any_text_is_a_host_or_the_documented_error(text: str) -> None:
    try:
        host = parse_host(text)
    except HostNameError:
        return

    assert host.isascii()
    assert parse_host(host) == host


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789-", max_size=59))
def test_any_punycode_is_a_label_or_the_documented_error(text: str) -> None:
    try:
        parse_hostname(f"xn--{text}.com")
    except HostNameError:
        return
