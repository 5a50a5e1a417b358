"""The opening handshake of WebSocket (RFC 6455 section 4): what an upgrade must be on both sides.

Only the handshake: the frames after it pass through unread. Any other upgrade is no upgrade here;
its request is answered as the plain HTTP/1.1 that it also is (RFC 9110 section 7.8).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable

from taskvm.wire.message import Header, HttpRefused, field_values

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # section 1.3
_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==\Z")  # 16 bytes in base64


def asks_for_websocket(headers: Iterable[Header]) -> bool:
    """Say whether a request with these fields (names in lower case) asks for WebSocket."""
    return b"websocket" in {value.lower() for value in field_values(headers, b"upgrade")}


def check_opening(method: bytes, headers: list[Header], *, has_body: bool) -> None:
    """Check the request's side (section 4.2.1). Raises HttpRefused."""
    options = {value.lower() for value in field_values(headers, b"connection")}
    keys = [value for name, value in headers if name == b"sec-websocket-key"]
    if method != b"GET" or has_body or b"upgrade" not in options:
        raise HttpRefused(400, "a WebSocket is asked for by a GET with Connection: Upgrade")
    if len(keys) != 1 or not _KEY.match(keys[0]):
        raise HttpRefused(400, "a WebSocket is asked for with one Sec-WebSocket-Key of 16 bytes")


def check_acceptance(request: Iterable[Header], response: Iterable[Header]) -> None:
    """Check a server's 101 against its request (section 4.1). Raises HttpRefused."""
    keys = [value for name, value in request if name.lower() == b"sec-websocket-key"]
    fields = [(name.lower(), value) for name, value in response]
    accepted = [value for name, value in fields if name == b"sec-websocket-accept"]
    agreed = (
        asks_for_websocket(fields)
        and b"upgrade" in {value.lower() for value in field_values(fields, b"connection")}
        and accepted == [acceptance_of(key) for key in keys]
    )
    if not agreed:
        raise HttpRefused(502, "the server switched to something that is not this WebSocket")


def acceptance_of(key: bytes) -> bytes:
    """Return the Sec-WebSocket-Accept that answers a key."""
    digest = hashlib.sha1(key + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest)
