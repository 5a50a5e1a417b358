"""The OPEN of a connection on the net port: where to. Both sides send it (docs/protocol-control.md, The net port)."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

GUEST_LOOPBACK = "127.0.0.1"


class ConnectRequest(
    msgspec.Struct,
    frozen=True,
    tag_field="op",
    tag="connect",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """From the guest: where its program connected to. From the host: a port of the guest's loopback.

    `exec` is the guest's word for which exec the program belongs to, the stream on the control port; 0 is unknown. It
    may be any number: who uses it looks it up.
    """

    addr: str
    port: Annotated[int, Meta(ge=1, le=65535)]
    exec: int = 0


def encode_connect(request: ConnectRequest) -> bytes:
    """Return the payload of the OPEN."""
    return msgspec.msgpack.encode(request)


def decode_connect(payload: bytes | memoryview) -> ConnectRequest:
    """Read the payload of an OPEN. Raises msgspec.MsgspecError, or ValueError for text that is none."""
    return msgspec.msgpack.decode(payload, type=ConnectRequest)
