"""A Java key store that holds trusted certificates and nothing else, in the format JKS (version 2).

Java reads no PEM. The digest at the end is no secret's: every store of authorities has the password
"changeit", and Java loads those it trusts by default without checking it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

PASSWORD = "changeit"

_MAGIC, _VERSION, _TRUSTED_CERTIFICATE = 0xFEEDFEED, 2, 2


def render_keystore(certificates: Sequence[bytes], time_ms: int) -> bytes:
    """Return the store of these certificates (DER)."""
    store = struct.pack(">III", _MAGIC, _VERSION, len(certificates))
    for number, certificate in enumerate(certificates):
        store += struct.pack(">I", _TRUSTED_CERTIFICATE) + _text(f"taskvm-{number}")
        store += struct.pack(">Q", time_ms) + _text("X.509")
        store += struct.pack(">I", len(certificate)) + certificate
    key = PASSWORD.encode("utf-16-be") + b"Mighty Aphrodite"
    return store + hashlib.sha1(key + store, usedforsecurity=False).digest()


def _text(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode("ascii")
