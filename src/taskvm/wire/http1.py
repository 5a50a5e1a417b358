"""HTTP/1.1 to and from the relay's own messages, over what h11 has parsed (RFC 9112).

Rule 1: a message whose length two parsers could read differently is refused, not repaired.
Rule 2: hop-by-hop fields end here; h11 writes the framing anew.
"""

from __future__ import annotations

import re

import h11

from taskvm.wire.message import (
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
    field_values,
    response_fields,
)
from taskvm.wire.websocket import asks_for_websocket, check_acceptance, check_opening

_REQUEST_START = re.compile(rb"(?:CONNECT [^ ]|[A-Z][A-Z-]{0,31} (?:[/*]|[hH][tT][tT][pP]:))")
_MAX_REQUEST_START = 40
_PREFACE = b"PRI * HTTP/2"  # RFC 9113 section 3.4: HTTP/2 in clear is not spoken here


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


# Requests.


def read_request(request: h11.Request, origin: Origin) -> Asked:
    """Return what was asked of `origin`, checked."""
    head: RequestHead | HttpRefused
    try:
        head = check_request(request, origin)
    except HttpRefused as refused:
        head = refused.without_frames()
    return Asked(request.method, request.target, head)


def check_request(request: h11.Request, origin: Origin) -> RequestHead:
    """Return the request as it may be forwarded to `origin`. Raises HttpRefused."""
    if request.http_version not in (b"1.0", b"1.1"):
        raise HttpRefused(505, f"HTTP/{request.http_version.decode('ascii')} is not spoken here")
    fields = list(request.headers)
    check_size(fields, request.target)
    check_method(request.method)
    has_body = _check_framing(request)
    check_expectation(fields)
    target = check_target(request.method, request.target, origin)
    check_authority(_only_host(fields), origin, "the Host header")
    # Before HTTP/1.1 there is no upgrade (RFC 9110 section 7.8).
    websocket = request.http_version == b"1.1" and asks_for_websocket(fields)
    if websocket:
        check_opening(request.method, fields, has_body=has_body)
    headers = [item for item in _kept(request) if item[0].lower() != b"host"]
    return RequestHead(request.method, target, headers, has_body, websocket)


def render_request(head: RequestHead, origin: Origin) -> h11.Request:
    """Return the request for h11 to write. Raises HttpRefused."""
    kept = _with_one_cookie(end_to_end(head.headers))
    headers = [(b"Host", origin.authority.encode("ascii")), *kept]
    if head.has_body and not any(name.lower() == b"content-length" for name, _ in headers):
        headers.append((b"Transfer-Encoding", b"chunked"))
    if head.websocket:
        headers += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
    try:
        return h11.Request(method=head.method, target=head.target, headers=headers)
    except h11.LocalProtocolError:
        # `from None`: h11 quotes the header, and a secret's value may stand in it.
        raise HttpRefused(400, "a header cannot be sent") from None


def _with_one_cookie(headers: list[Header]) -> list[Header]:
    """Join the cookies that a client of HTTP/2 has sent one by one (RFC 9113 section 8.2.3)."""
    cookies = [value for name, value in headers if name.lower() == b"cookie"]
    if len(cookies) < 2:
        return headers
    others = [item for item in headers if item[0].lower() != b"cookie"]
    return [*others, (b"Cookie", b"; ".join(cookies))]


# Responses.


def read_response(
    response: h11.Response | h11.InformationalResponse, request: RequestHead
) -> ResponseHead:
    """Return a response for the guest. Raises HttpRefused for one that is not to be trusted."""
    status = response.status_code
    if status == 101:
        check_acceptance(request.headers, response.headers)
    fields = list(response.headers)
    lengths = field_values(fields, b"content-length")
    if lengths and field_values(fields, b"transfer-encoding"):
        raise HttpRefused(502, "the server's response has two lengths")
    ended = request.method == b"HEAD" or status in (204, 304) or lengths == [b"0"]
    return ResponseHead(status, response_fields(*_with_named(response)), response.reason, ended)


def render_informational(head: ResponseHead) -> h11.InformationalResponse:
    """Return a 1xx response for h11 to write; a 101 with the fields that make it one."""
    headers = list(head.headers)
    if head.status == 101:
        headers += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
    return h11.InformationalResponse(status_code=head.status, headers=headers, reason=head.reason)


def render_response(head: ResponseHead, *, close: bool) -> h11.Response:
    """Return a final response for h11 to write, which adds what its framing needs."""
    headers = list(head.headers)
    if close:
        headers.append((b"Connection", b"close"))
    return h11.Response(status_code=head.status, headers=headers, reason=head.reason)


# Fields.


def _check_framing(request: h11.Request) -> bool:
    """Refuse what smuggling is made of (RFC 9112 section 6.1); say whether a body follows."""
    fields = list(request.headers)
    encodings = field_values(fields, b"transfer-encoding")
    lengths = field_values(fields, b"content-length")
    if not encodings:
        return bool(lengths) and lengths != [b"0"]
    if request.http_version == b"1.0" or lengths:
        raise HttpRefused(400, "the request has two lengths")
    if [value.lower() for value in encodings] != [b"chunked"]:
        raise HttpRefused(501, "only the transfer encoding chunked is supported")
    return True


def _only_host(headers: list[Header]) -> bytes:
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1:
        raise HttpRefused(400, "the request does not have exactly one Host header")
    return hosts[0]


def _kept(message: h11.Request) -> list[Header]:
    return end_to_end(*_with_named(message))


def _with_named(
    message: h11.Request | h11.Response | h11.InformationalResponse,
) -> tuple[list[Header], set[bytes]]:
    """Return the fields, spelled as they came, and which of them Connection names."""
    named = {item.lower() for item in field_values(message.headers, b"connection")}
    # The framing and the authority cannot be talked away by `Connection: content-length, host`.
    return message.headers.raw_items(), named - {b"content-length", b"host"}
