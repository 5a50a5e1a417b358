"""HTTP messages as the relay and the policy see them, whichever version carried them (RFC 9110).

Rule 1: a head has end-to-end fields only; framing and authority are written anew by each version.
Rule 2: the authority of a request is the one of its connection, in every place where it is written.
Rule 3: a message whose length two parsers could read differently is refused, not repaired.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from taskvm.wire.hostname import HostNameError, parse_authority, render_authority

MAX_HEAD = 64 * 1024  # bytes of a request's or a response's head; servers refuse from 8 to 64 KiB
# Fields of a head or a trailer. Apache takes 100; a client of HTTP/2 may send 180 cookies one by one.
MAX_FIELDS = 256

Header = tuple[bytes, bytes]
Scheme = Literal["http", "https"]
DEFAULT_PORTS: dict[Scheme, int] = {"http": 80, "https": 443}

# RFC 9110 section 7.6.1, what intermediaries invented, and h2c's (RFC 7540 section 3.2.1).
HOP_BY_HOP = frozenset(
    {
        b"connection", b"http2-settings", b"keep-alive", b"proxy-authenticate",
        b"proxy-authorization", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
# Answers that would lead the guest around the relay (HTTP/3 on UDP).
_DROPPED_FROM_RESPONSES = frozenset({b"alt-svc"})
# RFC 9110 section 6.5.1: what frames, routes or authorizes must have been there to be judged.
_NOT_IN_TRAILERS = HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"authorization",
    b"cookie",
    b"trailer",
}

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_VALUE = re.compile(rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?\Z")
_TARGET = re.compile(rb"[\x21-\x7e]+\Z")


class HttpRefused(Exception):  # noqa: N818 - an outcome, not a fault of ours
    """Raised for a message that is not relayed.

    `status` answers it, where an answer is possible.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason

    def without_frames(self) -> HttpRefused:
        """Return it without what raising it keeps alive: frames, and in them the whole message."""
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the requests of one guest connection may go: scheme, canonical host, port."""

    scheme: Scheme
    host: str
    port: int

    @property
    def authority(self) -> str:
        """The text of the Host header, and of HTTP/2's :authority."""
        return render_authority(self.host, self.port, DEFAULT_PORTS[self.scheme])


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request as it will be sent: origin-form target, end-to-end fields without Host.

    A Content-Length among the fields is the body's; without one a body's length is not known yet.
    """

    method: bytes
    target: bytes
    headers: list[Header] = field(repr=False)  # secrets' values are put into them
    has_body: bool = False
    websocket: bool = False  # asks to become a WebSocket (HTTP/1.1 only)

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition(b"?")[0].decode("ascii")


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A response, final or informational; `ended` says that neither body nor trailer follows."""

    status: int
    headers: list[Header]
    reason: bytes = b""
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """What the guest wrote on its request line, and what the checks of its version made of it."""

    method: bytes
    target: bytes
    head: RequestHead | HttpRefused


class BodyFilter(Protocol):
    """What a body goes through, piece by piece. What it raises breaks the message off."""

    def feed(self, data: bytes) -> bytes:
        """Return what is sure of the body after another piece of it; it may be nothing."""

    def finish(self) -> bytes:
        """Return the rest, after the last piece."""


# Checks that both versions make.


def check_method(method: bytes) -> None:
    """Refuse methods that are not for origins. Raises HttpRefused."""
    if not _TOKEN.match(method):
        raise HttpRefused(400, "the request's method is no token")
    meant = method.upper()  # methods have case; servers that do not know it take "trace" for TRACE
    if meant == b"CONNECT":
        raise HttpRefused(403, "CONNECT is refused: connections need no proxy here")
    if meant in (b"TRACE", b"TRACK"):  # the answer would show the guest our headers
        raise HttpRefused(501, "TRACE is refused: its answer repeats what was sent, secrets too")


def check_target(method: bytes, target: bytes, origin: Origin) -> bytes:
    """Return the target as a path. Raises HttpRefused."""
    if not _TARGET.match(target) or b"#" in target or b"\\" in target:
        raise HttpRefused(400, "the request's target has a character that URLs do not have")
    if target.startswith(b"/"):
        return target
    if target == b"*" and method == b"OPTIONS":
        return target
    scheme, separator, rest = target.partition(b"://")
    if not separator or scheme.lower() != origin.scheme.encode("ascii"):
        raise HttpRefused(
            400, "the request's target is neither a path nor a URL of this connection"
        )
    end = min((rest.find(mark) for mark in (b"/", b"?") if mark in rest), default=len(rest))
    check_authority(rest[:end], origin, "the request's target")
    path = rest[end:]
    return path if path.startswith(b"/") else b"/" + path


def check_authority(text: bytes, origin: Origin, place: str) -> None:
    """Refuse another authority than the connection's. Raises HttpRefused."""
    try:
        authority = parse_authority(text.decode("latin-1"), DEFAULT_PORTS[origin.scheme])
    except HostNameError as error:
        raise HttpRefused(400, f"{place} is refused: {error}") from error
    if authority != (origin.host, origin.port):
        raise HttpRefused(
            403, f"{place} names another host or port than the connection was made to"
        )


def check_expectation(headers: Iterable[Header]) -> None:
    """Refuse to expect what no server need understand. Raises HttpRefused."""
    if any(value.lower() != b"100-continue" for value in field_values(headers, b"expect")):
        raise HttpRefused(417, "only 100-continue can be expected")


def check_header(name: bytes, value: bytes) -> None:
    """Refuse a field that could end a line, or be two. Raises HttpRefused."""
    if not _TOKEN.match(name):
        raise HttpRefused(400, "a header's name is no token")
    if not _VALUE.match(value):
        raise HttpRefused(400, "a header's value has control characters or outer spaces")


def check_size(headers: Sequence[Header], target: bytes = b"") -> None:
    """Refuse a head that is too long. Raises HttpRefused."""
    # An indexed field of HTTP/2 is one byte on the wire, and a hundred here.
    if len(headers) > MAX_FIELDS:
        raise HttpRefused(431, f"the request has more than {MAX_FIELDS} header fields")
    # h11 bounds a head that is incomplete; one that arrives whole in two reads it takes.
    if sum(len(name) + len(value) + 4 for name, value in headers) + len(target) > MAX_HEAD:
        raise HttpRefused(431, "the request's head is too long")


# Fields.


def field_values(headers: Iterable[Header], name: bytes) -> list[bytes]:
    """Return the members of a field's lists; `name` and the names are in lower case."""
    return [
        item.strip()
        for key, value in headers
        if key == name
        for item in value.split(b",")
        if item.strip()
    ]


def end_to_end(headers: Iterable[Header], named: Iterable[bytes] = ()) -> list[Header]:
    """Return the fields that go beyond this hop; `named` are those that Connection names."""
    dropped = HOP_BY_HOP.union(named)
    return [item for item in headers if item[0].lower() not in dropped]


def response_fields(headers: Iterable[Header], named: Iterable[bytes] = ()) -> list[Header]:
    """Return the fields of a response that the guest gets. Raises HttpRefused."""
    kept = [
        item
        for item in end_to_end(headers, named)
        if item[0].lower() not in _DROPPED_FROM_RESPONSES
    ]
    try:
        check_size(kept)
    except HttpRefused:
        raise HttpRefused(502, "the server's response has a head that is too long") from None
    return kept


def without_length(headers: Iterable[Header]) -> list[Header]:
    """Return the fields of a message whose body will have another length."""
    return [item for item in headers if item[0].lower() != b"content-length"]


def trailer_fields(headers: Sequence[Header]) -> list[Header]:
    """Return the fields of a trailer that may stand there. Raises HttpRefused for too many."""
    check_size(headers)
    return [(name, value) for name, value in headers if name.lower() not in _NOT_IN_TRAILERS]


def render_refusal(kind: str, host: str, rule: str, reason: str, hint: str = "") -> bytes:
    """Return the JSON body that tells a program in the guest why it got no answer."""
    error = {"type": kind, "host": host, "rule": rule, "reason": reason, "hint": hint}
    return (
        msgspec.json.encode({"error": {key: text for key, text in error.items() if text}}) + b"\n"
    )
