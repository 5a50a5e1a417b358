"""A sandbox's network without a VM: a real Gateway, a socketpair, and real programs.

The guest end opens streams as the agent does and bridges local TCP listeners to them, so that curl
and Python's own clients talk to it. Servers are real ones on 127.0.0.1, let in by an address rule.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import os
import re
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import trustme
from tests.support.tcp import tcp_server
from tests.support.waiting import PATIENCE_S

from taskvm.egress.audit import AuditEvent, parse_event
from taskvm.egress.boundsecret import BoundSecret, bind_secrets
from taskvm.egress.oversight import Oversight
from taskvm.egress.passthrough import Passthrough
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.errors import TaskvmError, UpstreamError
from taskvm.net.auditlog import AuditLog
from taskvm.net.certs import CertificateAuthority
from taskvm.net.gateway import Gateway
from taskvm.net.streams import GuestStream
from taskvm.net.tlsstream import TlsStream
from taskvm.port import FramePort, Inlet, Outlet, StreamReset
from taskvm.wire.frames import GUEST_STREAM_BIT, Frame, FrameType, decode_u32
from taskvm.wire.hostname import IPAddress

SERVER_CA = trustme.CA()


class RecordingResolver:
    """The host's resolver: a table, and a record of what it was asked."""

    def __init__(self, table: Mapping[str, Sequence[str]]) -> None:
        self.table = dict(table)
        self.asked: list[str] = []

    async def resolve(self, host: str) -> Sequence[IPAddress]:
        self.asked.append(host)
        if host not in self.table:
            raise UpstreamError(f"look up {host}", "the name does not exist or has no address")
        return [ipaddress.ip_address(text) for text in self.table[host]]


class Guest:
    """The agent's side of the net port."""

    def __init__(self, port: FramePort) -> None:
        self.port = port
        self.lost: Exception | None = None
        self.ignored: set[int] = set()  # streams whose answers nobody waits for
        self._next = GUEST_STREAM_BIT + 1
        self._flows: dict[int, tuple[Inlet, Outlet]] = {}
        self._replies: dict[int, asyncio.Future[bytes]] = {}
        port.on_frame = self._on_frame
        port.on_lost = self._on_lost

    async def query(self, message: bytes) -> bytes:
        """Send one DNS message and return its answer."""
        number = self._number()
        self.port.send(FrameType.DATAGRAM, 0, number, message)
        return await self._reply(number)

    async def resolve(self, name: str, qtype: int = 1) -> tuple[int, str | None]:
        """Look a name up as the guest's resolver does; return the rcode and the address."""
        answer = await self.query(dns_query(name, qtype))
        _, flags, _, count = struct.unpack_from(">HHHH", answer)
        address = str(ipaddress.IPv4Address(answer[-4:])) if count else None
        return flags & 15, address

    async def connect(self, address: str, port: int, **claims: object) -> GuestSocket:
        """Open a connection; `claims` are further fields of its OPEN. Raises StreamReset."""
        number = self._number()
        flows = Inlet(self.port, number, 0), Outlet(self.port, number, 0)
        self._flows[number] = flows
        request = {"op": "connect", "addr": address, "port": port, **claims}
        self.port.send(FrameType.OPEN, 0, number, msgspec.msgpack.encode(request))
        await self._reply(number)
        return GuestSocket(self, number, *flows)

    @contextlib.asynccontextmanager
    async def listen(
        self, address: str, port: int, local: tuple[str, int] = ("127.0.0.1", 0)
    ) -> AsyncIterator[int]:
        """Bridge a local TCP port to connections to (address, port)."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                await self._bridge(reader, writer, await self.connect(address, port))
            if writer.transport.is_closing():
                writer.transport.abort()

        async with tcp_server(serve, *local) as bridged:
            yield bridged

    async def _bridge(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sock: GuestSocket
    ) -> None:
        async def up() -> None:
            while data := await reader.read(65536):
                await sock.write(data)
            sock.end()

        async def down() -> None:
            try:
                while data := await sock.read():
                    writer.write(data)
                    await writer.drain()
                writer.write_eof()
            except StreamReset:
                linger = struct.pack("ii", 1, 0)  # close with RST, as the agent does
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
                writer.transport.abort()

        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                uploading = group.create_task(up())
                await down()
                uploading.cancel()

    def _number(self) -> int:
        self._next += 1
        return self._next

    async def _reply(self, number: int) -> bytes:
        future = self._replies[number] = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(PATIENCE_S):
            return await future

    def _on_frame(self, frame: Frame) -> None:
        inlet, outlet = self._flows.get(frame.stream, (None, None))
        waiting = self._replies.pop(frame.stream, None)
        if frame.type is FrameType.RESET:
            error = StreamReset(decode_u32(frame.payload))
            if waiting is not None:
                waiting.set_exception(error)
            if inlet is not None and outlet is not None:
                inlet.fail(error)
                outlet.fail(error)
        elif frame.type in (FrameType.REPLY, FrameType.DATAGRAM):
            assert waiting is not None or frame.stream in self.ignored
            if waiting is not None:
                waiting.set_result(bytes(frame.payload))
        elif inlet is not None and outlet is not None:
            if frame.type is FrameType.DATA:
                inlet.feed(frame.payload)
            elif frame.type is FrameType.END:
                inlet.feed_end()
            elif frame.type is FrameType.CREDIT:
                outlet.feed_credit(decode_u32(frame.payload))

    def _on_lost(self, reason: Exception) -> None:
        self.lost = reason
        for future in self._replies.values():
            if not future.done():
                future.set_exception(reason)
        for inlet, outlet in self._flows.values():
            inlet.fail(reason)
            outlet.fail(reason)


class GuestSocket:
    """One connection, as a program in the guest has it."""

    def __init__(self, guest: Guest, number: int, inlet: Inlet, outlet: Outlet) -> None:
        self.number = number
        self._guest = guest
        self._inlet = inlet
        self._outlet = outlet

    async def write(self, data: bytes) -> None:
        await self._outlet.write(data)

    async def read(self) -> bytes:
        return await self._inlet.read()

    async def read_all(self) -> bytes:
        """Return everything up to the end. Raises StreamReset."""
        received = b""
        while data := await self.read():
            received += data
        return received

    async def read_response(self) -> bytes:
        """Return one response that has a Content-Length."""
        received = b""
        while data := await self.read():
            received += data
            head, found, body = received.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: ([0-9]+)", head)
            if found and length is not None and len(body) >= int(length.group(1)):
                break
        return received

    async def exchange(self, request: bytes) -> bytes:
        """Send a request and return everything up to the end of the connection."""
        await self.write(request)
        return await self.read_all()

    def stream(self) -> GuestStream:
        """Return the connection as a byte stream, for TLS."""
        return GuestStream(self._inlet, self._outlet)

    def end(self) -> None:
        self._outlet.end()

    def reset(self) -> None:
        self._outlet.reset(104)


@dataclass
class Lab:
    """A gateway under test and what can be observed of it."""

    guest: Guest
    gateway: Gateway
    policy: Policy
    secrets: tuple[BoundSecret, ...]
    ca: CertificateAuthority
    resolver: RecordingResolver
    ca_file: str
    lines: list[bytes]
    audit: AuditLog
    failure: Exception | None = None

    @property
    def events(self) -> list[AuditEvent]:
        return [parse_event(line) for line in self.lines]

    def denials(self, kind: str) -> list[AuditEvent]:
        return [e for e in self.events if (e.kind, e.decision) == (kind, "deny")]

    async def address_of(self, name: str) -> str:
        rcode, address = await self.guest.resolve(name)
        assert rcode == 0
        assert address is not None
        return address

    async def connect(self, name: str, port: int) -> GuestSocket:
        """Look `name` up and connect to it, as a program does."""
        return await self.guest.connect(await self.address_of(name), port)

    @contextlib.asynccontextmanager
    async def tls(
        self, address: str, port: int, server_name: str | None, alpn: Sequence[str] = ()
    ) -> AsyncIterator[TlsStream]:
        """Connect to an address and speak TLS there, claiming to mean `server_name`."""
        context = self.client_tls()
        context.check_hostname = server_name is not None
        if alpn:
            context.set_alpn_protocols(alpn)
        sock = await self.guest.connect(address, port)
        stream = TlsStream(sock.stream(), context, server_hostname=server_name)
        await stream.handshake()
        yield stream

    def client_tls(self) -> ssl.SSLContext:
        """Return the TLS settings of a program in the guest: it trusts our authority only."""
        context = ssl.create_default_context(cafile=self.ca_file)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context


@contextlib.asynccontextmanager
async def egress_lab(
    *,
    allow: Sequence[str] = (),
    allow_addresses: Sequence[str] = (),
    rules: str = "",
    oversight: Oversight | None = None,
    hosts: dict[str, Sequence[str]] | None = None,
    secrets: Sequence[Secret] = (),
    passthrough: Sequence[str] = (),
    max_log_bytes: int = 10_000_000,
    running_execs: Sequence[int] = (),
) -> AsyncIterator[Lab]:
    """Run a gateway for a policy (`rules` is a policy file's text); `hosts` is what the host's resolver knows."""
    policy = Policy.from_text(rules).joined(Policy.parse(allow, allow_addresses))
    bound = bind_secrets(policy, secrets, os.urandom)
    passed = Passthrough.parse(passthrough, policy, secrets)
    lines: list[bytes] = []
    audit = AuditLog(lines.append, "box", max_bytes=max_log_bytes)
    resolver = RecordingResolver(hosts or {})
    ca = CertificateAuthority.create()
    host_end, guest_end = socket.socketpair()
    with tempfile.TemporaryDirectory() as folder:
        server_ca = _write(folder, "server.pem", SERVER_CA.cert_pem.bytes())
        our_ca = _write(folder, "taskvm.pem", ca.certificate_pem)
        port = await FramePort.open(host_end, "taskvm.net")
        gateway = Gateway(
            port, policy=policy, secrets=bound, audit=audit, ca=ca, resolver=resolver,
            extra_ca_files=[server_ca], passthrough=passed, oversight=oversight,
            is_running=lambda number: number in running_execs,
        )  # fmt: skip
        guest = Guest(await FramePort.open(guest_end, "the host"))
        lab = Lab(guest, gateway, policy, bound, ca, resolver, our_ca, lines, audit)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(_run(lab))
            try:
                yield lab
            finally:
                guest.port.close()
                running.cancel()
        port.close()


def _write(folder: str, name: str, data: bytes) -> str:
    path = Path(folder, name)
    path.write_bytes(data)
    return str(path)


async def _run(lab: Lab) -> None:
    try:
        await lab.gateway.run()
    except TaskvmError as error:
        lab.failure = error


# Servers.


@dataclass
class Seen:
    """A request that reached a server."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k.lower() == name.lower()), None)


@dataclass
class HttpServer:
    """A real HTTP server, and what reached it."""

    port: int
    requests: list[Seen] = field(default_factory=list)
    connections: int = 0


@contextlib.contextmanager
def http_server(
    *names: str, expired: bool = False, untrusted: bool = False
) -> Iterator[HttpServer]:
    """Serve HTTP on 127.0.0.1, over TLS when it has names.

    It echoes a body, and counts connections.
    """
    seen = HttpServer(0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = PATIENCE_S
        disable_nagle_algorithm = True  # two small writes for one answer: 40 ms otherwise

        def setup(self) -> None:
            seen.connections += 1
            super().setup()

        def _serve(self) -> None:
            body = self._read_body()
            seen.requests.append(Seen(self.command, self.path, list(self.headers.items()), body))
            answer = body or b"hello from the server"
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Alt-Svc", 'h3=":443"')
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        def _read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return body

        def log_message(self, *arguments: object) -> None:
            pass

    for method in ("GET", "POST", "PUT", "HEAD", "OPTIONS", "PROPFIND"):
        setattr(Handler, f"do_{method}", Handler._serve)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # refused handshakes and broken connections are what the tests make

    with Server(("127.0.0.1", 0), Handler) as server:
        if names:
            server.socket = _tls_context(names, expired, untrusted).wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        seen.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield seen
        server.shutdown()
        thread.join()


@contextlib.asynccontextmanager
async def scripted_server(
    answer: bytes, *, close: bool = True, address: str = "127.0.0.1"
) -> AsyncIterator[HttpServer]:
    """Serve these bytes, whatever is asked, after the head of a request; record what came."""
    seen = HttpServer(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            seen.requests.append(Seen("", "", [], head))
            writer.write(answer)
            await writer.drain()
            if not close:
                await reader.read()

    async with tcp_server(serve, address) as seen.port:
        yield seen


async def read_all(stream: TlsStream) -> bytes:
    """Return everything up to the end of a TLS connection."""
    received = b""
    while data := await stream.read():
        received += data
    return received


def chunks_of(answer: bytes) -> list[bytes]:
    """Return the pieces of a response's body, in which they come by chance."""
    chunks, rest = [], answer.partition(b"\r\n\r\n")[2]
    while size := int(rest.partition(b"\r\n")[0], 16):
        rest = rest.partition(b"\r\n")[2]
        chunks.append(rest[:size])
        rest = rest[size + 2 :]
    return chunks


def hello_with_ech(name: bytes) -> bytes:
    """Return a real ClientHello with an encrypted_client_hello extension put at its end."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=name.decode())
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    body = outgoing.read()[9:]
    at = 2 + 32
    at += 1 + body[at]
    at += 2 + int.from_bytes(body[at : at + 2], "big")
    at += 1 + body[at]
    extensions = body[at + 2 :] + b"\xfe\x0d\x00\x0a" + bytes(10)
    body = body[:at] + struct.pack(">H", len(extensions)) + extensions
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + struct.pack(">H", len(message)) + message


def dns_query(name: str, qtype: int = 1) -> bytes:
    """Return the query that a stub resolver sends."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + struct.pack(">BHH", 0, qtype, 1)


def _tls_context(names: Sequence[str], expired: bool, untrusted: bool) -> ssl.SSLContext:
    authority = trustme.CA() if untrusted else SERVER_CA
    past = dt.datetime(2020, 1, 1, tzinfo=dt.UTC) if expired else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names, not_after=past).configure_cert(context)
    return context
