"""TLS by MemoryBIO, both roles, over a stream that gives bytes as it likes."""

from __future__ import annotations

import asyncio
import ssl

import pytest

from taskvm.net.certs import CertificateAuthority
from taskvm.net.tlsstream import TlsStream


class Pipe:
    """One end of an in-memory connection that delivers at most `piece` bytes at once."""

    def __init__(self, incoming: asyncio.Queue[bytes], outgoing: asyncio.Queue[bytes], piece: int):
        self._incoming = incoming
        self._outgoing = outgoing
        self._piece = piece
        self._rest = b""
        self.aborted = False

    async def read(self, max_bytes: int = 65536) -> bytes:
        data = self._rest or await self._incoming.get()
        size = min(self._piece, max_bytes)
        self._rest = data[size:]
        return data[:size]

    async def write(self, data: bytes) -> None:
        await self._outgoing.put(data)

    async def end(self) -> None:
        await self._outgoing.put(b"")

    def abort(self) -> None:
        self.aborted = True


def connect(piece: int) -> tuple[TlsStream, TlsStream, Pipe]:
    ca = CertificateAuthority.create()
    up: asyncio.Queue[bytes] = asyncio.Queue(2)
    down: asyncio.Queue[bytes] = asyncio.Queue(2)
    client_context = ssl.create_default_context(cadata=ca.certificate_pem.decode())
    client = TlsStream(Pipe(down, up, piece), client_context, server_hostname="api.test")
    raw = Pipe(up, down, piece)
    return client, TlsStream(raw, ca.server_context("api.test"), server_side=True), raw


@pytest.mark.parametrize("piece", [1, 100, 65536])
async def test_bytes_pass_both_ways_and_end(piece: int) -> None:
    client, server, _ = connect(piece)
    message = b"0123456789" * 300

    async def serve() -> None:
        await server.handshake()
        received = b""
        while len(received) < len(message):
            received += await server.read()
        await server.write(received[::-1])
        await server.end()

    async with asyncio.TaskGroup() as group:
        group.create_task(serve())
        await client.handshake()
        await client.write(message)
        answer = b""
        while data := await client.read():
            answer += data

    assert answer == message[::-1]
    assert client.version == server.version == "TLSv1.3"


async def test_writing_much_waits_for_the_reader() -> None:
    client, server, _ = connect(65536)
    async with asyncio.TaskGroup() as group:
        group.create_task(client.handshake())
        await server.handshake()
    async with asyncio.TaskGroup() as group:
        writing = group.create_task(server.write(bytes(10_000_000)))
        await asyncio.sleep(0.05)
        assert not writing.done()
        received = 0
        while received < 10_000_000:
            received += len(await client.read())


async def test_a_failed_handshake_sends_its_alert() -> None:
    client, server, _ = connect(65536)
    stranger = ssl.create_default_context(
        cadata=CertificateAuthority.create().certificate_pem.decode()
    )
    client = TlsStream(client._raw, stranger, server_hostname="api.test")

    async def serve() -> None:
        with pytest.raises(ssl.SSLError, match="(?i)unknown.ca"):
            await server.handshake()

    async with asyncio.TaskGroup() as group:
        group.create_task(serve())
        with pytest.raises(ssl.SSLCertVerificationError):
            await client.handshake()


async def test_garbage_is_an_ssl_error() -> None:
    _, server, raw = connect(65536)
    raw._incoming.put_nowait(b"GET / HTTP/1.1\r\n\r\n")

    with pytest.raises(ssl.SSLError):
        await server.handshake()
    server.abort()
    assert raw.aborted
