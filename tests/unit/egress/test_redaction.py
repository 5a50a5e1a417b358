"""Turning values back in responses (taskvm.egress.redaction)."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.egress.boundsecret import bind_secret
from taskvm.egress.policy import Policy
from taskvm.egress.redaction import Redactor, is_readable
from taskvm.egress.secret import Secret

POLICY = Policy.parse(["api.test"])
VALUE = "sk-live-0123456789"
BOUND = bind_secret(POLICY, Secret("KEY", VALUE, hosts=["api.test"]), os.urandom)


@given(
    st.lists(st.binary(max_size=30) | st.just(VALUE.encode()) | st.just(b"sk-live-0"), max_size=8)
)
def test_the_value_is_in_no_stream_whatever_way_it_is_cut(pieces: list[bytes]) -> None:
    found: list[str] = []
    body = Redactor([BOUND], {}, found.append).body()

    shown = b"".join(map(body.feed, pieces)) + body.finish()

    whole = b"".join(pieces)
    assert VALUE.encode() not in shown
    assert shown == whole.replace(VALUE.encode(), BOUND.placeholder.encode())
    assert len(found) == whole.count(VALUE.encode())


def test_a_short_value_is_not_looked_for() -> None:
    short = bind_secret(POLICY, Secret("S", "ok", hosts=["api.test"]), os.urandom)

    assert Redactor([short], {}, print).headers([(b"A", b"look ok")]) == [(b"A", b"look ok")]


@pytest.mark.parametrize(
    ("headers", "readable"),
    [
        ([], True),
        ([(b"Content-Type", b"text/event-stream")], True),
        ([(b"content-type", b"application/problem+json; charset=utf-8")], True),
        ([(b"Content-Type", b"application/json"), (b"Content-Encoding", b"identity")], True),
        ([(b"Content-Type", b"application/json"), (b"Content-Encoding", b"gzip")], False),
        ([(b"Content-Type", b"application/octet-stream")], False),
        ([(b"Content-Type", b"image/png"), (b"Content-Type", b"text/html")], True),
        ([(b"Content-Type", b"text/html"), (b"Content-Type", b"image/png")], True),
        ([(b"Content-Type", b"multipart/mixed; boundary=x")], True),
        ([(b"Content-Type", b"message/http")], True),
        ([(b"Content-Encoding", b"identity, identity")], True),
        ([(b"Content-Encoding", b"identity"), (b"Content-Encoding", b"br")], False),
        ([(b"Content-Type", b"application/grpc")], False),
        ([(b"Content-Type", b"application/ndjson")], True),
        ([(b"Content-Type", b"application/x-yaml")], True),
        ([(b"Content-Type", b"application/toml")], True),
        ([(b"Content-Type", b"x-unheard/of")], True),
        ([(b"Content-Type", b"no type at all")], True),
        ([(b"Content-Type", b"image/svg+xml")], True),
        ([(b"Content-Type", b"application/vnd.oci.image.layer.v1.tar+gzip")], False),
    ],
)
def test_text_that_is_not_compressed_is_readable(
    headers: list[tuple[bytes, bytes]], readable: bool
) -> None:
    assert is_readable(headers) is readable


@pytest.mark.parametrize("before", ["", "u", "us", "user:", "user:pa:"])
@pytest.mark.parametrize("after", ["", "x", "xy", "xyz, more"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_the_value_is_found_within_base64(
    before: str, after: str, encode: Callable[[bytes], bytes]
) -> None:
    """Wherever it stands: nothing of the value that a whole character says is left."""
    value = "sk~live>0?1<2}3|4"
    bound = bind_secret(POLICY, Secret("KEY", value, hosts=["api.test"]), os.urandom)
    echoed = encode(f"{before}{value}{after}".encode())

    shown = Redactor([bound], {}, print).text(b"Basic " + echoed)

    assert bound.placeholder.encode() in shown
    left = shown.removeprefix(b"Basic ").replace(bound.placeholder.encode(), b"")
    assert len(left) <= len(encode(f"{before}{after}".encode())) + 4


@pytest.mark.parametrize(
    "written",
    ["a%2fb%26c%22d%3ce", 'a/b\\u0026c\\"d\\u003ce', "a/b&amp;c&#34;d&lt;e", 'a\\/b&c\\"d<e'],
)
def test_other_programs_spellings_are_found(written: str) -> None:
    """Escapes in lower case (curl's users), Go's JSON and HTML, PHP's JSON."""
    bound = bind_secret(POLICY, Secret("KEY", 'a/b&c"d<e', hosts=["api.test"]), os.urandom)

    assert Redactor([bound], {}, print).text(written.encode()) == bound.placeholder.encode()


@pytest.mark.parametrize(
    "written",
    [
        "a+b%2Fc=!d:",  # as we put it into a path
        "a%2Bb%2Fc%3D!d%3A",  # JavaScript's encodeURIComponent
        "a+b/c=!d:",
        "a+b%2Fc=%21d:",  # Go's url.PathEscape
        "a+b%2fc=%21d:",
        "a+b/c=%21d:",  # Go's URL.String
        "a%2Bb%2Fc%3D%21d%3A",
    ],
)
def test_what_urls_make_of_a_value_is_found(written: str) -> None:
    """Many pages of errors and redirects repeat the path that was asked for, as they write it."""
    bound = bind_secret(POLICY, Secret("KEY", "a+b/c=!d:", hosts=["api.test"]), os.urandom)

    assert Redactor([bound], {}, print).text(written.encode()) == bound.placeholder.encode()
