"""SSH's way to say no (RFC 4253): a version line and a disconnect message, before any key exchange.

Clients show its text: OpenSSH as "Received disconnect from …: 1: text".
"""

from __future__ import annotations

import struct

MAX_TEXT = 400  # characters; OpenSSH shows no more

_VERSION = b"SSH-2.0-taskvm\r\n"
_DISCONNECT = 1  # section 11.1
_NOT_ALLOWED = 1  # SSH_DISCONNECT_HOST_NOT_ALLOWED_TO_CONNECT
_BLOCK = 8  # section 6: also without a cipher
_LEAST_PADDING = 4


def is_ssh(data: bytes) -> bool:
    """Say whether a client that begins so speaks SSH."""
    return data.startswith(b"SSH-")


def render_disconnect(text: str) -> bytes:
    """Return what a server says that lets nobody in."""
    shown = "".join(sign if " " <= sign <= "~" else "?" for sign in text[:MAX_TEXT]).encode()
    payload = struct.pack(">BII", _DISCONNECT, _NOT_ALLOWED, len(shown)) + shown
    payload += struct.pack(">I", 0)  # no language
    padding = _BLOCK - (5 + len(payload)) % _BLOCK
    padding += _BLOCK if padding < _LEAST_PADDING else 0
    header = struct.pack(">IB", 1 + len(payload) + padding, padding)
    return _VERSION + header + payload + bytes(padding)
