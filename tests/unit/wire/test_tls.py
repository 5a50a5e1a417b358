"""The ClientHello: as OpenSSL writes it, in pieces, damaged, and as no honest client writes it."""

from __future__ import annotations

import ssl
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.wire.tls import ClientHello, TlsError, is_tls, parse_client_hello


def openssl_hello(name: str | None, *alpn: str) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.set_alpn_protocols(list(alpn))
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


HELLO = openssl_hello("api.test", "h2", "http/1.1")


def build(*extensions: tuple[int, bytes], tail: bytes = b"") -> bytes:
    """Return a record with a ClientHello that has these extensions."""
    block = b"".join(struct.pack(">HH", kind, len(data)) + data for kind, data in extensions)
    body = b"\x03\x03" + bytes(32) + b"\x00" + b"\x00\x02\x13\x01" + b"\x01\x00"
    body += struct.pack(">H", len(block)) + block + tail
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + struct.pack(">H", len(message)) + message


def server_name(name: bytes, kind: int = 0) -> tuple[int, bytes]:
    entry = bytes([kind]) + struct.pack(">H", len(name)) + name
    return 0, struct.pack(">H", len(entry)) + entry


def test_openssls_hello_is_read() -> None:
    assert parse_client_hello(HELLO) == ClientHello("api.test", (b"h2", b"http/1.1"))
    assert parse_client_hello(openssl_hello(None)) == ClientHello(None)


def test_it_is_incomplete_until_its_last_byte() -> None:
    assert all(parse_client_hello(HELLO[:size]) is None for size in range(len(HELLO)))
    assert parse_client_hello(HELLO + b"more") is not None


def test_it_may_span_records() -> None:
    message = HELLO[5:]
    pieces = [message[start : start + 100] for start in range(0, len(message), 100)]
    split = b"".join(b"\x16\x03\x01" + struct.pack(">H", len(p)) + p for p in pieces)

    assert parse_client_hello(split) == parse_client_hello(HELLO)


def test_a_name_is_canonical_and_a_hidden_one_is_seen() -> None:
    hello = parse_client_hello(build(server_name(b"API.Test"), (0xFE0D, b"x")))

    assert hello == ClientHello("api.test", encrypted=True)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\xff\xff\x01",
        b"\x16\x02\x01\x00\x05\x01\x00\x00\x01\x00",
        b"\x17\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00",
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",
        build(server_name(b"api.test"), server_name(b"evil.test")),
        build(server_name(b"api.test", kind=1)),
        build(server_name(b"127.0.0.1")),
        build(server_name(b"a\0b")),
        build(server_name(b"")),
        build((0, b"\x00\x00")),
        build((0, server_name(b"a.test")[1] + b"x")),
        build((0, b"\x00\x16" + server_name(b"a.test")[1][2:] * 2)),
        build((16, b"\x00\x05\x02h2")),
        build((16, b"\x00\x03\x02h2x")),
        build(tail=b"x"),
    ],
)
def test_what_no_honest_client_sends_is_refused(data: bytes) -> None:
    with pytest.raises(TlsError):
        parse_client_hello(data)


def test_a_hello_that_never_ends_is_refused() -> None:
    endless = b"\x16\x03\x01\x00\x04\x01\x00\x40\x00" + b"\x16\x03\x01\x00\x01x" * 16

    with pytest.raises(TlsError, match="too many records"):
        parse_client_hello(endless)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"\x16", True), (b"\x16\x03", True), (b"\x16\x04", False), (b"G", False)],
)
def test_tls_is_told_by_its_first_bytes(data: bytes, expected: bool) -> None:
    assert is_tls(data) is expected


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    message = b"\x01" + len(data).to_bytes(3, "big") + data
    record = b"\x16\x03\x01" + struct.pack(">H", len(message)) + message
    for text in (data, record):
        try:
            parse_client_hello(text)
        except TlsError:
            continue


@given(st.integers(0, len(HELLO) - 1), st.integers(0, 255))
def test_a_damaged_hello_raises_nothing_else(position: int, byte: int) -> None:
    damaged = bytearray(HELLO)
    damaged[position] = byte
    try:
        parse_client_hello(bytes(damaged))
    except TlsError:
        return
