"""The opening handshake of WebSocket: what is one, and what only looks like one."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.wire.http1 import check_request, render_request
from taskvm.wire.message import HttpRefused, Origin
from taskvm.wire.websocket import acceptance_of, check_acceptance

ORIGIN = Origin("http", "api.test", 80)
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
OPENING = {
    "Host": "api.test", "Connection": "keep-alive, Upgrade", "Upgrade": "websocket",
    "Sec-WebSocket-Key": KEY, "Sec-WebSocket-Version": "13",
}  # fmt: skip
ACCEPTED = [
    (b"Upgrade", b"WebSocket"),
    (b"Connection", b"upgrade"),
    (b"Sec-WebSocket-Accept", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
]


def opening(method: str = "GET", **changed: str | None) -> h11.Request:
    fields = {**OPENING, **{name.replace("_", "-"): value for name, value in changed.items()}}
    headers = [(name, value) for name, value in fields.items() if value is not None]
    return h11.Request(method=method, target="/chat", headers=headers)


def test_the_acceptance_is_that_of_the_specification() -> None:
    assert acceptance_of(KEY.encode()) == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def test_an_opening_is_forwarded_as_one() -> None:
    head = check_request(opening(Sec_WebSocket_Protocol="chat"), ORIGIN)
    sent = dict(render_request(head, ORIGIN).headers)

    assert head.websocket
    assert (sent[b"connection"], sent[b"upgrade"]) == (b"Upgrade", b"websocket")
    assert (sent[b"sec-websocket-key"], sent[b"sec-websocket-protocol"]) == (KEY.encode(), b"chat")


@pytest.mark.parametrize(
    "request_",
    [
        opening("POST"),
        opening(Connection="keep-alive"),
        opening(Connection=None),
        opening(Sec_WebSocket_Key=None),
        opening(Sec_WebSocket_Key="short"),
        opening(Sec_WebSocket_Key=f"{KEY},{KEY}"),
        opening(Content_Length="5"),
        opening(Transfer_Encoding="chunked"),
    ],
)
def test_what_only_looks_like_an_opening_is_refused(request_: h11.Request) -> None:
    with pytest.raises(HttpRefused):
        check_request(request_, ORIGIN)


@pytest.mark.parametrize("upgrade", ["h2c", "TLS/1.0", "websocket2", ""])
def test_another_upgrade_is_none(upgrade: str) -> None:
    head = check_request(opening(Upgrade=upgrade), ORIGIN)

    assert not head.websocket
    assert b"upgrade" not in dict(render_request(head, ORIGIN).headers)


def test_an_acceptance_is_checked_against_its_request() -> None:
    request = check_request(opening(), ORIGIN).headers

    check_acceptance(request, ACCEPTED)
    for missing in range(3):
        with pytest.raises(HttpRefused):
            check_acceptance(request, ACCEPTED[:missing] + ACCEPTED[missing + 1 :])
    with pytest.raises(HttpRefused):
        check_acceptance(request, [*ACCEPTED[:2], (b"Sec-WebSocket-Accept", b"another")])
    with pytest.raises(HttpRefused):
        check_acceptance(request, [*ACCEPTED, ACCEPTED[2]])


@given(st.lists(st.tuples(st.binary(max_size=30), st.binary(max_size=30)), max_size=6))
def test_no_random_fields_are_an_acceptance(fields: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(HttpRefused):
        check_acceptance([(b"sec-websocket-key", KEY.encode())], fields)
