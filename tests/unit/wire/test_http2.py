"""HTTP/2 without a connection: what is checked in messages, and what one side may make the other do."""

from __future__ import annotations

import contextlib

import h2.connection
import h2.events
import h2.settings
import pytest
from h2.errors import ErrorCodes
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from taskvm.wire.http2 import (
    MAX_FRAME,
    MAX_IDLE_FRAMES,
    RESET_COST,
    Http2Codec,
    Http2Error,
    read_request,
    read_response,
    render_request,
    render_response,
    render_trailer,
)
from taskvm.wire.message import MAX_HEAD, Header, HttpRefused, Origin, RequestHead, ResponseHead

ORIGIN = Origin("https", "api.test", 8443)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def request(
    *headers: Header, method: bytes = b"GET", path: bytes = b"/", authority: bytes = b"api.test:8443",
    scheme: bytes = b"https",
) -> list[Header]:  # fmt: skip
    pseudo = [(b":method", method), (b":scheme", scheme), (b":path", path)]
    return [*pseudo, (b":authority", authority), *headers]


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def headers_frame(stream: int, fields: list[Header], *, flags: int = 0x5) -> bytes:
    return frame(1, Encoder().encode(fields), flags=flags, stream=stream)


def server() -> Http2Codec:
    codec = Http2Codec(client_side=False)
    codec.receive(PREFACE + frame(4))
    codec.h2.data_to_send()
    return codec


# Messages.


def test_a_request_is_read_and_rendered() -> None:
    fields = request((b"x-one", b"1"), (b"te", b"trailers"), method=b"POST", path=b"/a?b")
    asked = read_request(fields, ORIGIN, ended=False)

    assert asked.head == RequestHead(
        b"POST", b"/a?b", [(b"x-one", b"1"), (b"te", b"trailers")], has_body=True
    )
    assert sorted(render_request(asked.head, ORIGIN)) == sorted(fields)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (request(authority=b"evil.test"), 403),
        (request(authority=b"api.test"), 403),
        (request(authority=b"u@api.test:8443"), 400),
        (request((b"host", b"evil.test")), 400),
        (request()[:3], 400),
        (request(scheme=b"http"), 400),
        (request(method=b"CONNECT"), 403),
        (request(method=b"TRACE"), 501),
        (request(method=b"track"), 501),
        (request(method=b"GET /x HTTP/1.1"), 400),
        (request(path=b"/a b HTTP/1.1"), 400),
        (request(path=b"http://evil.test/"), 400),
        (request(path=b"*"), 400),
        (request(path=b"a"), 400),
        (request(path=b""), 400),
        (request(path=b"/\xff"), 400),
        (request((b"content-length", b"1"), (b"content-length", b"2")), 400),
        (request((b"content-length", b"+5")), 400),
        (request((b"content-length", b"5, 5")), 400),
        (request((b"expect", b"200-ok")), 417),
        (request((b"x", b"a" * MAX_HEAD)), 431),
    ],
)
def test_what_is_no_request_of_this_connection_is_refused(
    fields: list[Header], status: int
) -> None:
    asked = read_request(fields, ORIGIN, ended=True)

    assert isinstance(asked.head, HttpRefused)
    assert asked.head.status == status


@pytest.mark.parametrize("value", [b"a\r\nx: 1", b"a\nb", b"a\0b"])
def test_a_value_that_would_be_two_lines_is_not_sent(value: bytes) -> None:
    with pytest.raises(HttpRefused, match=r"^a header cannot be sent$"):
        render_request(RequestHead(b"GET", b"/", [(b"x", value)]), ORIGIN)


def test_a_response_is_read_and_rendered_without_what_is_for_one_hop() -> None:
    fields = [(b":status", b"200"), (b"alt-svc", b"h3"), (b"set-cookie", b"a")]
    head = read_response(fields, ended=True)

    assert head == ResponseHead(200, [(b"set-cookie", b"a")], ended=True)
    sent = render_response(ResponseHead(200, [(b"X-A", b"1"), (b"Connection", b"close")]))
    assert sent == [(b":status", b"200"), (b"x-a", b"1")]


@pytest.mark.parametrize("status", [b"101", b"20", b"2000", b"099", b"abc", b""])
def test_a_status_that_http2_does_not_have_is_refused(status: bytes) -> None:
    with pytest.raises(HttpRefused):
        read_response([(b":status", status)], ended=False)


def test_no_field_of_ours_is_put_into_a_table() -> None:
    """Not even when the peer offers one of four gigabytes: secrets would stay in it, and it grows."""
    codec = Http2Codec(client_side=True)
    settings = (1).to_bytes(2, "big") + (2**32 - 1).to_bytes(4, "big")
    codec.receive(frame(4, settings))
    head = RequestHead(b"GET", b"/", [(b"authorization", b"Bearer value"), (b"x-other", b"1")])
    for number in (1, 3):
        codec.h2.send_headers(number, render_request(head, ORIGIN), end_stream=True)

    assert len(codec.h2.encoder.header_table.dynamic_entries) == 0
    assert all(not field.indexable for field in render_trailer([(b"x", b"1")]))


@pytest.mark.parametrize("size", [0, 100, 2**32 - 1])
@pytest.mark.parametrize("together", [True, False])
def test_a_peer_that_sets_the_tables_size_hears_that_it_is_nothing(
    size: int, *, together: bool
) -> None:
    """Once, before the next fields, however its settings come (RFC 7541 section 4.2)."""
    settings = [PREFACE + frame(4), frame(4, b"\0\x01" + size.to_bytes(4, "big"))]
    codec = Http2Codec(client_side=False)
    for data in [b"".join(settings)] if together else settings:
        codec.receive(data)
    codec.receive(headers_frame(1, request()) + headers_frame(3, request()))
    codec.h2.data_to_send()

    blocks = []
    for stream in (1, 3):
        codec.h2.send_headers(stream, render_response(ResponseHead(204, [], ended=True)))
        blocks.append((codec.h2.data_to_send() or b"")[9:])

    assert blocks[0] == b"\x20" + blocks[1]
    assert Decoder().decode(blocks[0], raw=True)[0] == (b":status", b"204")


# Floods: each ends the connection, with a GOAWAY, after a bounded number of frames.


def flood(codec: Http2Codec, frames: list[bytes]) -> int:
    """Feed frames until the codec has enough; return how many it took."""
    for count, data in enumerate(frames):
        try:
            codec.receive(data)
        except Http2Error:
            assert b"\x07\0\0\0\0\0" in codec.h2.data_to_send()  # GOAWAY on stream 0
            return count
        codec.h2.data_to_send()
    return len(frames)


@pytest.mark.parametrize(
    "idle",
    [
        frame(6, bytes(8)),  # PING
        frame(4),  # SETTINGS
        frame(4, b"\0\x04\0\0\xff\xff"),
        frame(8, (1).to_bytes(4, "big")),  # WINDOW_UPDATE
        frame(2, bytes(5), stream=5),  # PRIORITY
        frame(0xEE, b"x"),  # unknown
    ],
)
def test_frames_that_carry_nothing_are_counted(idle: bytes) -> None:
    codec = server()

    assert flood(codec, [idle] * (MAX_IDLE_FRAMES + 10)) <= MAX_IDLE_FRAMES


def test_empty_data_is_counted() -> None:
    codec = server()
    codec.receive(headers_frame(1, request(method=b"POST"), flags=0x4))

    assert flood(codec, [frame(0, stream=1)] * (MAX_IDLE_FRAMES + 10)) <= MAX_IDLE_FRAMES


def test_streams_that_are_opened_and_reset_are_counted() -> None:
    """Rapid reset (CVE-2023-44487)."""
    opened = [
        headers_frame(number, request()) + frame(3, bytes(4), stream=number)
        for number in range(1, 4 * MAX_IDLE_FRAMES // RESET_COST, 2)
    ]

    assert flood(server(), opened) <= MAX_IDLE_FRAMES // RESET_COST


def test_work_earns_the_frames_that_answer_it() -> None:
    codec = server()
    ping = frame(6, bytes(8))
    for _ in range(3 * MAX_IDLE_FRAMES):
        codec.receive(ping)
        codec.h2.data_to_send()
        codec.earn()


def test_continuation_without_end_is_ended() -> None:
    """CVE-2024-27316 and its kind: a head that never ends."""
    start = frame(1, b"", flags=0x1, stream=1)
    more = frame(9, Encoder().encode([(b"x", b"y" * 1000)]), stream=1)

    assert flood(server(), [start] + [more] * 1000) < 100


def test_a_head_that_unpacks_into_too_much_is_ended() -> None:
    """An HPACK bomb: one entry of 4 KB, named ten thousand times in ten kilobytes."""
    entry = Encoder().encode([(b"x", b"a" * 4000)], huffman=False)
    bomb = entry + b"\xbe" * 10_000

    with pytest.raises(Http2Error):
        server().receive(frame(1, bomb, flags=0x5, stream=1))


def test_a_frame_beyond_the_size_that_was_said_is_ended() -> None:
    with pytest.raises(Http2Error):
        server().receive(frame(0, bytes(MAX_FRAME + 1), stream=1))


def test_a_pushed_stream_is_refused() -> None:
    codec = Http2Codec(client_side=True)
    codec.receive(frame(4))
    codec.h2.send_headers(1, request(), end_stream=True)
    promised = (2).to_bytes(4, "big") + Encoder().encode(request())

    with pytest.raises(Http2Error):
        codec.receive(frame(5, promised, flags=0x4, stream=1))


@pytest.mark.parametrize(
    "fields",
    [
        request((b"connection", b"close")),
        request((b"transfer-encoding", b"chunked")),
        request((b"Upper", b"1")),
        request((b"x\r\ny", b"1")),
        request((b"x", b"a\r\nb")),
        request((b"", b"1")),
        request((b"te", b"gzip")),
        [*request(), (b":path", b"/other")],
        [(b"x", b"1"), *request()],
        request((b":protocol", b"websocket"), method=b"GET"),
    ],
)
def test_a_malformed_head_ends_the_connection(fields: list[Header]) -> None:
    with pytest.raises(Http2Error) as caught:
        server().receive(headers_frame(1, fields))

    assert "chunked" not in caught.value.reason


# Any bytes, and any cuts.


@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_raise_nothing_but_the_documented_error(data: bytes, preface: bool) -> None:
    codec = Http2Codec(client_side=False)
    with contextlib.suppress(Http2Error):
        codec.receive(PREFACE + frame(4) + data if preface else data)


@given(st.integers(0, 9), st.integers(0, 255), st.integers(0, 3), st.binary(max_size=60))
def test_any_frame_is_taken_or_ends_the_connection(
    kind: int, flags: int, stream: int, payload: bytes
) -> None:
    codec = server()
    codec.receive(headers_frame(1, request(method=b"POST"), flags=0x4))
    with contextlib.suppress(Http2Error):
        codec.receive(frame(kind, payload, flags=flags, stream=stream))


@given(st.lists(st.integers(1, 120), max_size=6))
def test_a_conversation_cut_anywhere_means_the_same(cuts: list[int]) -> None:
    whole = PREFACE + frame(4) + headers_frame(1, request(method=b"PUT"), flags=0x4)
    whole += frame(0, b"body", flags=0x1, stream=1)
    codec = Http2Codec(client_side=False)
    pieces, rest = [], whole
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    events = [event for piece in [*pieces, rest] for event in codec.receive(piece)]

    kinds = [type(event) for event in events]
    assert kinds.count(h2.events.RequestReceived) == kinds.count(h2.events.StreamEnded) == 1
    assert b"".join(e.data for e in events if isinstance(e, h2.events.DataReceived)) == b"body"


def test_the_limits_are_told_to_the_peer() -> None:
    peer = h2.connection.H2Connection()
    peer.receive_data(Http2Codec(client_side=False).h2.data_to_send())

    settings = peer.remote_settings
    assert settings.max_concurrent_streams == 100
    assert settings.max_header_list_size == MAX_HEAD
    assert settings.get(h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL, 0) == 0
    assert ErrorCodes.ENHANCE_YOUR_CALM == 0xB
