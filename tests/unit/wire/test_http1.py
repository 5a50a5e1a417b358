"""What the relay checks in HTTP/1.1, and in any message (taskvm.wire.message), without a connection."""

from __future__ import annotations

import json

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.wire.http1 import (
    check_request,
    looks_like_request,
    read_request,
    read_response,
    render_request,
)
from taskvm.wire.message import (
    MAX_FIELDS,
    HttpRefused,
    Origin,
    RequestHead,
    render_refusal,
    trailer_fields,
)

ORIGIN = Origin("https", "api.test", 443)


def request(
    *headers: tuple[str, str], method: str = "GET", target: str = "/", host: str = "api.test"
) -> h11.Request:
    return h11.Request(method=method, target=target, headers=[("Host", host), *headers])


@pytest.mark.parametrize("host", ["api.test", "API.test", "api.test.", "api.test:443"])
def test_the_host_is_sent_in_its_canonical_form(host: str) -> None:
    head = check_request(request(host=host), ORIGIN)

    assert head.headers == []
    assert list(render_request(head, ORIGIN).headers) == [(b"host", b"api.test")]


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/a/../b?c=%2F", b"/a/../b?c=%2F"),
        ("https://api.test/x", b"/x"),
        ("https://API.TEST:443?x", b"/?x"),
        ("https://api.test", b"/"),
        ("//evil.test/x", b"//evil.test/x"),
    ],
)
def test_a_target_is_sent_as_a_path_and_otherwise_unchanged(target: str, sent: bytes) -> None:
    assert check_request(request(target=target), ORIGIN).target == sent


def test_a_star_is_for_options_only() -> None:
    assert check_request(request(method="OPTIONS", target="*"), ORIGIN).target == b"*"
    with pytest.raises(HttpRefused):
        check_request(request(target="*"), ORIGIN)


def test_headers_keep_their_spelling_and_order_and_framing_is_kept() -> None:
    headers = [("X-B", "1"), ("x-a", "2"), ("X-B", "3"), ("Content-Length", "0")]

    head = check_request(request(*headers), ORIGIN)
    sent = render_request(head, ORIGIN).headers.raw_items()[1:]

    assert not head.has_body
    assert sent == [(b"X-B", b"1"), (b"x-a", b"2"), (b"X-B", b"3"), (b"Content-Length", b"0")]


def test_a_chunked_body_stays_chunked() -> None:
    head = check_request(request(("transfer-encoding", "Chunked"), method="POST"), ORIGIN)

    assert head.has_body
    assert list(render_request(head, ORIGIN).headers)[-1] == (b"transfer-encoding", b"chunked")


def test_an_address_in_brackets_is_an_authority() -> None:
    origin = Origin("http", "2001:db8::1", 8080)

    head = check_request(request(host="[2001:DB8::1]:8080"), origin)

    assert list(render_request(head, origin).headers) == [(b"host", b"[2001:db8::1]:8080")]


def test_a_response_loses_what_is_for_one_hop_or_leads_around() -> None:
    response = h11.Response(
        status_code=200,
        headers=[("Alt-Svc", "h3"), ("Keep-Alive", "x"), ("Connection", "x-hop"), ("X-Hop", "1"),
                 ("Set-Cookie", "a"), ("Set-Cookie", "b")],
    )  # fmt: skip

    head = read_response(response, RequestHead(b"GET", b"/", []))

    assert head.headers == [(b"Set-Cookie", b"a"), (b"Set-Cookie", b"b")]
    assert not head.ended


@pytest.mark.parametrize(
    ("method", "status", "length"), [("HEAD", 200, "5"), ("GET", 204, None), ("GET", 200, "0")]
)
def test_an_answer_without_a_body_is_told_by_its_head(
    method: str, status: int, length: str | None
) -> None:
    headers = [("Content-Length", length)] if length else []
    response = h11.Response(status_code=status, headers=headers)

    assert read_response(response, RequestHead(method.encode(), b"/", [])).ended


def test_a_refused_request_still_says_what_was_asked() -> None:
    asked = read_request(request(method="TRACE", target="/x"), ORIGIN)

    assert (asked.method, asked.target) == (b"TRACE", b"/x")
    assert isinstance(asked.head, HttpRefused)


def test_a_field_that_cannot_be_sent_is_refused_without_being_quoted() -> None:
    head = RequestHead(b"GET", b"/", [(b"X", b"secret\r\nX-Other: 1")])

    with pytest.raises(HttpRefused, match=r"^a header cannot be sent$"):
        render_request(head, ORIGIN)


def test_a_trailer_of_very_many_fields_is_refused() -> None:
    with pytest.raises(HttpRefused):
        trailer_fields([(b"x", b"y")] * (MAX_FIELDS + 1))


def test_a_trailer_cannot_bring_what_frames_or_authorizes() -> None:
    fields = [(b"X-Sum", b"1"), (b"Content-Length", b"5"), (b"authorization", b"x")]

    assert trailer_fields(fields) == [(b"X-Sum", b"1")]


def test_a_refusal_is_json_without_empty_fields() -> None:
    body = render_refusal("egress_denied", "a.test", "default", 'no "rule"\n')

    assert json.loads(body) == {
        "error": {
            "type": "egress_denied", "host": "a.test", "rule": "default", "reason": 'no "rule"\n'
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    "start", [b"GET / HTTP/1.1\r\n", b"PROPFIND /", b"OPTIONS *", b"GET http:", b"CONNECT a"]
)
def test_a_request_is_told_by_its_start_and_not_before(start: bytes) -> None:
    decided = [looks_like_request(start[:size]) for size in range(1, len(start) + 1)]

    assert decided[-1] is True
    assert set(decided) == {None, True}


@pytest.mark.parametrize(
    "start", [b"SSH-2.0-x", b"EHLO a", b"get / ", b"\r\n", b"PRI * HTTP/2.0", b"A" * 40, b"GET a"]
)
def test_what_is_no_request_is_told_too(start: bytes) -> None:
    assert looks_like_request(start) is False


@given(st.binary(max_size=50))
def test_any_start_is_decided_within_forty_bytes(data: bytes) -> None:
    assert looks_like_request(data) in (True, False, None)
    assert looks_like_request(data.ljust(40, b"x")) in (True, False)


@given(
    st.from_regex(rb"[\x21-\x7e]{1,60}", fullmatch=True),
    st.from_regex(rb"[\x21-\x7e]{1,40}", fullmatch=True),
)
def test_any_target_and_host_pass_or_are_refused(target: bytes, host: bytes) -> None:
    try:
        head = check_request(
            h11.Request(method="GET", target=target, headers=[("Host", host)]), ORIGIN
        )
    except HttpRefused as error:
        assert error.status in (400, 403)  # noqa: PT017 - either outcome is fine
        return

    assert head.headers == []
    assert head.target.startswith(b"/")
