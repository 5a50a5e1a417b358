"""Turning values back in responses (taskvm.egress.redaction)."""

from __future__ import annotations

import os

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
        ([(b"Content-Type", b"application/grpc")], False),
    ],
)
def test_text_that_is_not_compressed_is_readable(
    headers: list[tuple[bytes, bytes]], readable: bool
) -> None:
    assert is_readable(headers) is readable
