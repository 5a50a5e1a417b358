"""What an HTTP/1.1 relay checks and changes in a message h11 has parsed (RFC 9110, RFC 9112).

Rule 1: a message whose length two parsers could read differently is refused, not repaired.
Rule 2: the authority of a request is the one of its connection, in every place where it is written.
Rule 3: hop-by-hop headers end here; h11 writes the framing anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import h11
import msgspec

from taskvm.wire.hostname import HostNameError, parse_authority, render_authority

MAX_HEAD = 64 * 1024  # bytes of a request's or a response's head; servers refuse from 8 to 64 KiB

Header = tuple[bytes, bytes]
Scheme = Literal["http", "https"]
DEFAULT_PORTS: dict[Scheme, int] = {"http": 80, "https": 443}

# RFC 9110 section 7.6.1, and the two that intermediaries invented.
_HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
        b"proxy-connection", b"te", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
# Answers that would lead the guest around the relay (HTTP/3 on UDP).
_DROPPED_FROM_RESPONSES = frozenset({b"alt-svc"})

_REQUEST_START = re.compile(rb"(?:CONNECT [^ ]|[A-Z][A-Z-]{0,31} (?:[/*]|[hH][tT][tT][pP]:))")
_MAX_REQUEST_START = 40
_PREFACE = b"PRI * HTTP/2"  # RFC 9113 section 3.4


class HttpRefused(Exception):  # noqa: N818 - an outcome, not a fault of ours
    """Raised for a message that is not relayed.

    `status` answers it, where an answer is possible.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the requests of one guest connection may go: scheme, canonical host, port."""

    scheme: Scheme
    host: str
    port: int

    @property
    def authority(self) -> str:
        """The text of the Host header."""
        return render_authority(self.host, self.port, DEFAULT_PORTS[self.scheme])


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request as it will be sent: origin-form target, canonical Host, end-to-end headers only."""

    method: bytes
    target: bytes
    headers: list[Header] = field(repr=False)  # secrets' values are put into them

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition(b"?")[0].decode("ascii")


def looks_like_request(data: bytes) -> bool | None:
    """Say whether what starts with `data` speaks HTTP/1; None: more bytes are needed."""
    if data.startswith(_PREFACE):
        return False
    if _REQUEST_START.match(data):
        return None if _PREFACE.startswith(data) else True
    if len(data) >= _MAX_REQUEST_START:
        return False
    # A first word in capitals, as yet without what must follow it.
    return None if re.match(rb"[A-Z][A-Z-]{0,31}( ([hH][tT]{0,2}[pP]?)?)?\Z", data) else False


def check_request(request: h11.Request, origin: Origin) -> RequestHead:
    """Return the request as it may be forwarded to `origin`. Raises HttpRefused."""
    if request.http_version not in (b"1.0", b"1.1"):
        raise HttpRefused(505, f"HTTP/{request.http_version.decode('ascii')} is not spoken here")
    if _size(request.headers) + len(request.target) > MAX_HEAD:
        raise HttpRefused(431, "the request's head is too long")
    if request.method == b"CONNECT":
        raise HttpRefused(403, "CONNECT is refused: connections need no proxy here")
    if request.method in (b"TRACE", b"TRACK"):  # the answer would show the guest our headers
        raise HttpRefused(501, "TRACE is refused: its answer repeats what was sent, secrets too")
    if _values(request.headers, b"upgrade") or _values(request.headers, b"http2-settings"):
        raise HttpRefused(501, "Upgrade is not supported")
    chunked = _check_framing(request)
    if any(value.lower() != b"100-continue" for value in _values(request.headers, b"expect")):
        raise HttpRefused(417, "only 100-continue can be expected")
    target = _check_target(request, origin)
    _check_authority(_only_host(request), origin, "the Host header")
    headers = [(b"Host", origin.authority.encode("ascii"))]
    headers += [item for item in _end_to_end(request) if item[0].lower() != b"host"]
    if chunked:
        headers.append((b"Transfer-Encoding", b"chunked"))
    return RequestHead(request.method, target, headers)


def response_headers(response: h11.Response | h11.InformationalResponse) -> list[Header]:
    """Return the headers of a response for the guest. Raises HttpRefused for two lengths."""
    chunked = _values(response.headers, b"transfer-encoding")
    if chunked and _values(response.headers, b"content-length"):
        raise HttpRefused(502, "the server's response has two lengths")
    if _size(response.headers) > MAX_HEAD:
        raise HttpRefused(502, "the server's response has a head that is too long")
    return [
        item for item in _end_to_end(response) if item[0].lower() not in _DROPPED_FROM_RESPONSES
    ]


def trailer_headers(headers: Iterable[Header]) -> list[Header]:
    """Return the fields of a trailer that may stand there (RFC 9110 section 6.5.1)."""
    banned = _HOP_BY_HOP | {b"host", b"content-length", b"authorization", b"cookie", b"trailer"}
    return [(name, value) for name, value in headers if name.lower() not in banned]


def may_have_trailer(headers: Iterable[Header]) -> bool:
    """Say whether a message with these headers is chunked, so that a trailer can follow it."""
    return any(name.lower() == b"transfer-encoding" for name, _ in headers)


def render_refusal(kind: str, host: str, rule: str, reason: str, hint: str = "") -> bytes:
    """Return the JSON body that tells a program in the guest why it got no answer."""
    error = {"type": kind, "host": host, "rule": rule, "reason": reason, "hint": hint}
    return (
        msgspec.json.encode({"error": {key: text for key, text in error.items() if text}}) + b"\n"
    )


def _check_framing(request: h11.Request) -> bool:
    """Refuse what smuggling is made of (RFC 9112 section 6.1); say whether the body is chunked."""
    encodings = _values(request.headers, b"transfer-encoding")
    if not encodings:
        return False
    if request.http_version == b"1.0" or _values(request.headers, b"content-length"):
        raise HttpRefused(400, "the request has two lengths")
    if [value.lower() for value in encodings] != [b"chunked"]:
        raise HttpRefused(501, "only the transfer encoding chunked is supported")
    return True


def _check_target(request: h11.Request, origin: Origin) -> bytes:
    target = request.target
    if b"#" in target or b"\\" in target:
        raise HttpRefused(400, "the request's target has a character that URLs do not have")
    if target.startswith(b"/"):
        return target
    if target == b"*" and request.method == b"OPTIONS":
        return target
    scheme, separator, rest = target.partition(b"://")
    if not separator or scheme.lower() != origin.scheme.encode("ascii"):
        raise HttpRefused(
            400, "the request's target is neither a path nor a URL of this connection"
        )
    end = min((rest.find(mark) for mark in (b"/", b"?") if mark in rest), default=len(rest))
    _check_authority(rest[:end], origin, "the request's target")
    path = rest[end:]
    return path if path.startswith(b"/") else b"/" + path


def _only_host(request: h11.Request) -> bytes:
    hosts = [value for name, value in request.headers if name == b"host"]
    if len(hosts) != 1:
        raise HttpRefused(400, "the request does not have exactly one Host header")
    return hosts[0]


def _check_authority(text: bytes, origin: Origin, place: str) -> None:
    try:
        authority = parse_authority(text.decode("latin-1"), DEFAULT_PORTS[origin.scheme])
    except HostNameError as error:
        raise HttpRefused(400, f"{place} is refused: {error}") from error
    if authority != (origin.host, origin.port):
        raise HttpRefused(
            403, f"{place} names another host or port than the connection was made to"
        )


def _values(headers: Iterable[Header], name: bytes) -> list[bytes]:
    return [
        item.strip()
        for key, value in headers
        if key == name
        for item in value.split(b",")
        if item.strip()
    ]


def _size(headers: Iterable[Header]) -> int:
    # h11 bounds a head that is incomplete; one that arrives whole in two reads it takes.
    return sum(len(name) + len(value) + 4 for name, value in headers)


def _end_to_end(message: h11.Request | h11.Response | h11.InformationalResponse) -> list[Header]:
    """Return the headers, spelled as they came, without hop-by-hop ones and those Connection names."""
    named = {item.lower() for item in _values(message.headers, b"connection")}
    # The framing and the authority cannot be talked away by `Connection: content-length, host`.
    dropped = _HOP_BY_HOP | (named - {b"content-length", b"host"})
    return [item for item in message.headers.raw_items() if item[0].lower() not in dropped]
