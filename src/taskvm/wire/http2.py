"""HTTP/2 to and from the relay's own messages, and one side of a connection over h2 (RFC 9113).

Rule 1: what one connection can make us hold is bounded: streams, windows, heads, answers to pings.
Rule 2: what a peer sends is in proportion to what it asks for and takes: a flood of frames that
        carry nothing (pings, settings, resets, empty data) ends the connection.
Rule 3: our fields are never indexed: no table of ours holds a secret, or grows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from hpack import NeverIndexedHeaderTuple

from taskvm.wire.message import (
    MAX_HEAD,
    Asked,
    Header,
    HttpRefused,
    Origin,
    RequestHead,
    ResponseHead,
    check_authority,
    check_expectation,
    check_method,
    check_size,
    check_target,
    end_to_end,
    response_fields,
)

MAX_STREAMS = 100  # open at once that a guest may have; RFC 9113 section 6.5.2 advises no fewer
STREAM_WINDOW = 256 * 1024  # bytes unread of one stream
# Bytes unread of all: eight streams that nobody reads leave the others running.
CONNECTION_WINDOW = 8 * STREAM_WINDOW
MAX_FRAME = 64 * 1024  # taken; most peers send 16 KiB
# Frames that carry nothing, beyond those that our own frames have earned. Eleven hours of a ping
# every 10 s.
MAX_IDLE_FRAMES = 4_000
# A window update for its stream and one for the connection answer each DATA frame; and a ping.
IDLE_FRAMES_EARNED = 3
RESET_COST = (
    10  # idle frames: each reset has made us judge, record and perhaps dial (CVE-2023-44487)
)

_DEFAULT_WINDOW = 65_535  # RFC 9113 section 6.9.2
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # section 3.4
_DIGITS = re.compile(rb"[0-9]{1,18}\Z")
_LENGTH = b"content-length"

_IDLE_EVENTS = (
    h2.events.PingReceived,
    h2.events.PriorityUpdated,
    h2.events.RemoteSettingsChanged,
    h2.events.UnknownFrameReceived,
    h2.events.WindowUpdated,
)


class _Machine(h2.connection.H2ConnectionStateMachine):
    """h2's, except that a GOAWAY lets the streams that are open finish (RFC 9113 section 6.8)."""

    _open = h2.connection.ConnectionState.CLIENT_OPEN, h2.connection.ConnectionState.SERVER_OPEN
    _transitions = {  # noqa: RUF012 - as in its base
        **h2.connection.H2ConnectionStateMachine._transitions,
        **{(state, h2.connection.ConnectionInputs.RECV_GOAWAY): (None, state) for state in _open},
    }


class Http2Error(Exception):
    """Raised when the peer breaks HTTP/2 or floods: the connection is over, GOAWAY is queued."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _FrameSizes:
    """Reads the lengths of frames as they come: h2 looks at one when it has all of the frame."""

    def __init__(self, skip: int) -> None:
        self._skip = skip  # bytes that are no frame's head: the client's preface, then payloads
        self._head = b""

    def feed(self, data: bytes) -> bool:
        """Take bytes; say whether all lengths in them are ones that we allow."""
        position = 0
        while position < len(data):
            if self._skip:
                step = min(self._skip, len(data) - position)
                self._skip -= step
                position += step
                continue
            part = data[position : position + 9 - len(self._head)]
            position += len(part)
            self._head += part
            if len(self._head) == 9:
                self._skip = int.from_bytes(self._head[:3], "big")
                self._head = b""
                if self._skip > MAX_FRAME:
                    return False
        return True


class Http2Codec:
    """One side of a connection: bytes to h2's events, and h2's frames to bytes."""

    def __init__(self, *, client_side: bool, window: int = CONNECTION_WINDOW) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=client_side))
        self.h2.state_machine = _Machine()
        codes = h2.settings.SettingCodes
        self.h2.local_settings = h2.settings.Settings(
            client=client_side,
            initial_values={
                codes.ENABLE_PUSH: 0,
                codes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                codes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                codes.MAX_FRAME_SIZE: MAX_FRAME,
                codes.MAX_HEADER_LIST_SIZE: MAX_HEAD,
            },
        )
        self.h2.max_inbound_frame_size = MAX_FRAME
        self.h2.initiate_connection()
        if window > _DEFAULT_WINDOW:
            self.h2.increment_flow_control_window(window - _DEFAULT_WINDOW)
        self._disable_indexing()
        self._idle_frames = MAX_IDLE_FRAMES
        self._sizes = _FrameSizes(0 if client_side else len(_PREFACE))

    def receive(self, data: bytes) -> list[h2.events.Event]:
        """Return what the peer's bytes mean. Raises Http2Error."""
        if not self._sizes.feed(data):
            self.h2.close_connection(h2.errors.ErrorCodes.FRAME_SIZE_ERROR)
            raise Http2Error("a frame is longer than it was allowed to be")
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            # h2's own words quote the peer's bytes: they stay out of logs and answers.
            raise Http2Error(f"it is not valid HTTP/2 ({type(error).__name__})") from error
        for event in events:
            if isinstance(event, h2.events.RemoteSettingsChanged):
                self._disable_indexing()
            self._idle_frames -= _cost(event)
        if self._idle_frames < 0:
            self.h2.close_connection(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
            raise Http2Error("it sends too many frames that carry nothing")
        return events

    def earn(self) -> None:
        """Count a frame of ours that carries something: the peer may answer it."""
        self._idle_frames = min(self._idle_frames + IDLE_FRAMES_EARNED, MAX_IDLE_FRAMES)

    def _disable_indexing(self) -> None:
        """Use no table, and say so before the next fields, as a peer that wants it smaller waits for that.

        hpack would first name the size that the peer allows, or nothing where that is 0 too.
        """
        encoder = self.h2.encoder
        encoder.header_table_size = 0
        encoder.header_table.resized, encoder.table_size_changes = True, [0]


def _cost(event: h2.events.Event) -> int:
    if isinstance(event, h2.events.StreamReset):
        return RESET_COST
    if isinstance(event, h2.events.DataReceived):
        return int(not event.data and event.stream_ended is None)
    return int(isinstance(event, _IDLE_EVENTS))


# Requests.


def read_request(headers: Iterable[Header], origin: Origin, *, ended: bool) -> Asked:
    """Return what was asked of `origin`; h2 has checked the pseudo-fields' number and place."""
    fields = list(headers)
    method, target = _pseudo(fields, b":method"), _pseudo(fields, b":path")
    head: RequestHead | HttpRefused
    try:
        head = _check_request(fields, method, target, origin, ended=ended)
    except HttpRefused as refused:
        head = refused.without_frames()
    return Asked(method, target, head)


def _check_request(
    fields: list[Header], method: bytes, target: bytes, origin: Origin, *, ended: bool
) -> RequestHead:
    check_size(fields)
    check_method(method)
    if _pseudo(fields, b":scheme").lower() != origin.scheme.encode("ascii"):
        raise HttpRefused(400, "the request's scheme is not the connection's")
    authorities = {value for name, value in fields if name in (b":authority", b"host")}
    if len(authorities) != 1:
        raise HttpRefused(400, "the request does not have exactly one authority")
    check_authority(authorities.pop(), origin, "the request's authority")
    target = check_target(method, target, origin)
    check_expectation(fields)
    _check_length([value for name, value in fields if name == _LENGTH])
    headers = [item for item in fields if item[0][:1] != b":" and item[0] != b"host"]
    # `te: trailers`, the only one that h2 lets pass, is what gRPC asks its servers for.
    return RequestHead(method, target, headers, has_body=not ended)


def _check_length(lengths: list[bytes]) -> None:
    if len(lengths) > 1 or (lengths and not _DIGITS.match(lengths[0])):
        raise HttpRefused(400, "the request's length is not one number")


def render_request(head: RequestHead, origin: Origin) -> list[Header]:
    """Return the fields of a request. Raises HttpRefused."""
    wants_trailers = any(name.lower() == b"te" for name, _ in head.headers)
    fields = [
        (b":method", head.method),
        (b":scheme", origin.scheme.encode("ascii")),
        (b":authority", origin.authority.encode("ascii")),
        (b":path", head.target),
        *_lower(end_to_end(head.headers)),
    ]
    if wants_trailers:
        fields.append((b"te", b"trailers"))
    if any(sign in value for _, value in fields for sign in (b"\r", b"\n", b"\0")):
        raise HttpRefused(400, "a header cannot be sent")
    return _unindexed(fields)


# Responses.


def read_response(headers: Iterable[Header], *, ended: bool) -> ResponseHead:
    """Return a response for the guest. Raises HttpRefused for one that is not to be trusted."""
    fields = list(headers)
    status = _pseudo(fields, b":status")
    if not re.match(rb"[1-9][0-9]{2}\Z", status) or status == b"101":
        raise HttpRefused(502, "the server's response has no status that HTTP/2 knows")
    kept = response_fields(item for item in fields if item[0] != b":status")
    return ResponseHead(int(status), kept, ended=ended)


def render_response(head: ResponseHead) -> list[Header]:
    """Return the fields of a response, final or informational."""
    return _unindexed([(b":status", b"%d" % head.status), *_lower(end_to_end(head.headers))])


def render_trailer(trailer: Iterable[Header]) -> list[Header]:
    """Return the fields of a trailer."""
    return _unindexed(_lower(trailer))


# Fields.


def _pseudo(fields: Iterable[Header], name: bytes) -> bytes:
    return next((value for key, value in fields if key == name), b"")


def _lower(fields: Iterable[Header]) -> list[Header]:
    return [(name.lower(), value) for name, value in fields]


def _unindexed(fields: Iterable[Header]) -> list[Header]:
    return [NeverIndexedHeaderTuple(name, value) for name, value in fields]
