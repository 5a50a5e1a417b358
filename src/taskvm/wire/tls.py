"""The first message of a TLS client (RFC 8446 section 4.1.2), read before any TLS library sees it.

Only what egress is decided by: the server's name, the protocols offered, and whether the real name
is hidden (ECH). Fragmented over records or not; `parse_client_hello` returns None until it is
complete. The only exception is TlsError.
"""

from __future__ import annotations

from dataclasses import dataclass

from taskvm.wire.hostname import HostNameError, parse_hostname

MAX_CLIENT_HELLO = 16 * 1024  # bytes with record headers; post-quantum key shares need about 2 KiB

# Real clients use one or two. Without a bound, records of one byte make every look a long one.
MAX_RECORDS = 16

_HANDSHAKE = 22
_CLIENT_HELLO = 1
_EXT_SERVER_NAME = 0
_EXT_ALPN = 16
_EXT_ECH = 0xFE0D


class TlsError(ValueError):
    """Raised when the bytes are not a ClientHello that we accept."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What the client says: `server_name` canonical or None, `alpn` in its order of preference."""

    server_name: str | None
    alpn: tuple[bytes, ...] = ()
    encrypted: bool = False  # it has an encrypted_client_hello extension


class _Reader:
    """A cursor over bytes that must not end early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def take(self, size: int) -> bytes:
        part = self._data[self._position : self._position + size]
        if len(part) != size:
            raise TlsError("the ClientHello is cut short")
        self._position += size
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, length_size: int) -> _Reader:
        return _Reader(self.take(self.number(length_size)))

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._position)

    def __bool__(self) -> bool:
        return self._position < len(self._data)


def is_tls(data: bytes) -> bool:
    """Say whether these first bytes (at least one) can only be a TLS handshake record."""
    return data[:1] == b"\x16" and data[1:2] in (b"", b"\x03")


def parse_client_hello(data: bytes) -> ClientHello | None:
    """Read the ClientHello at the start of `data`, or return None when more bytes are needed.

    Raises TlsError.
    """
    message = _join_records(data)
    if message is None:
        if len(data) >= MAX_CLIENT_HELLO:
            raise TlsError("the ClientHello is too long")
        return None
    return _parse_body(_Reader(message))


def _join_records(data: bytes) -> bytes | None:
    """Return the body of the first handshake message, or None while it is incomplete."""
    message = b""
    position = 0
    for _ in range(MAX_RECORDS):
        if len(data) < position + 5:
            return None
        if data[position] != _HANDSHAKE or data[position + 1] != 3:
            raise TlsError("it is not a TLS handshake record")
        length = int.from_bytes(data[position + 3 : position + 5], "big")
        if not 0 < length <= MAX_CLIENT_HELLO:
            raise TlsError("a record is empty or too long")
        message += data[position + 5 : position + 5 + length]
        position += 5 + length
        if message and message[0] != _CLIENT_HELLO:
            raise TlsError("the first message is not a ClientHello")
        size = int.from_bytes(message[1:4], "big") if len(message) >= 4 else MAX_CLIENT_HELLO
        if size > MAX_CLIENT_HELLO:
            raise TlsError("the ClientHello is too long")
        if len(message) >= 4 + size:
            return message[4 : 4 + size]
    raise TlsError("the ClientHello is cut into too many records")


def _parse_body(body: _Reader) -> ClientHello:
    body.take(2 + 32)  # legacy_version, random
    body.vector(1)  # legacy_session_id
    body.vector(2)  # cipher_suites
    body.vector(1)  # legacy_compression_methods
    extensions = _read_extensions(body.vector(2)) if body else {}
    if body:
        raise TlsError("there is something after the extensions")
    return ClientHello(
        server_name=_read_server_name(extensions.get(_EXT_SERVER_NAME)),
        alpn=_read_alpn(extensions.get(_EXT_ALPN)),
        encrypted=_EXT_ECH in extensions,
    )


def _read_extensions(block: _Reader) -> dict[int, bytes]:
    extensions: dict[int, bytes] = {}
    while block:
        kind = block.number(2)
        if kind in extensions:  # RFC 8446 section 4.2; two server names are two opinions
            raise TlsError("an extension occurs twice")
        extensions[kind] = block.vector(2).rest()
    return extensions


def _read_server_name(data: bytes | None) -> str | None:
    if data is None:
        return None
    outer = _Reader(data)
    names = outer.vector(2)
    if names.number(1) != 0:
        raise TlsError("the server name is not a host name")
    name = names.vector(2).rest()
    if names or outer:
        raise TlsError("there is more than one server name")
    try:
        return parse_hostname(name.decode("latin-1"))
    except HostNameError as error:
        raise TlsError(f"the server name is refused: {error}") from error


def _read_alpn(data: bytes | None) -> tuple[bytes, ...]:
    if data is None:
        return ()
    outer = _Reader(data)
    names = outer.vector(2)
    protocols: list[bytes] = []
    while names:
        protocols.append(names.vector(1).rest())
    if outer:
        raise TlsError("there is something after the protocols")
    return tuple(protocols)
