"""The authorities that this host trusts, as text: for a guest that verifies some servers itself."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable
from pathlib import Path

_HASHED = re.compile(r"[0-9a-f]{8}\.[0-9]+\Z")  # a directory as `openssl rehash` leaves it


def host_authorities() -> bytes:
    """Return the certificates, PEM, that Python on this host verifies with by default."""
    paths = ssl.get_default_verify_paths()
    if paths.cafile is not None:
        return Path(paths.cafile).read_bytes()
    if paths.capath is None:
        return b""
    found = (path for path in sorted(Path(paths.capath).iterdir()) if _HASHED.match(path.name))
    return b"".join(_with_newline(path.read_bytes()) for path in found)


def make_bundle(own: bytes, extra_ca_files: Iterable[Path]) -> bytes:
    """Return what a guest trusts where not everything is intercepted; its gateway's `own` comes first."""
    files = (path.read_bytes() for path in extra_ca_files)
    return b"".join(_with_newline(text) for text in (own, host_authorities(), *files))


def _with_newline(text: bytes) -> bytes:
    return text if text.endswith(b"\n") else text + b"\n"
