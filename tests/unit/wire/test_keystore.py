"""Java's key stores: taskvm.wire.keystore. The format is Java's own, as of OpenJDK 17."""

from __future__ import annotations

import hashlib
import struct

from taskvm.wire.keystore import render_keystore


def test_a_store_has_the_certificates_and_the_digest_of_its_password() -> None:
    store = render_keystore([b"first", b"second"], time_ms=7)

    assert struct.unpack_from(">III", store) == (0xFEEDFEED, 2, 2)
    assert store.count(b"X.509") == 2
    assert store.index(b"\0\0\0\x05first") < store.index(b"\0\0\0\x06second")
    salted = "changeit".encode("utf-16-be") + b"Mighty Aphrodite" + store[:-20]
    assert store[-20:] == hashlib.sha1(salted).digest()


def test_an_empty_store_is_one() -> None:
    assert len(render_keystore([], 0)) == 12 + 20
