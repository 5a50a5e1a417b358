"""HTTP/2 peers for tests: a client on a byte stream and a server on 127.0.0.1, both by h2, both frank.

The client sends what it is told to, also what no client would. The server answers by path and writes
down what reached it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
from tests.support.egress_lab import SERVER_CA, Lab
from tests.support.waiting import PATIENCE_S

from taskvm.net.tlsstream import TlsStream

Fields = list[tuple[str, str]]


@dataclass
class Answer:
    """What came on one stream."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    informational: list[int] = field(default_factory=list)
    body: bytes = b""
    trailers: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    reset: int | None = None


class H2Client:
    """A client. `connection` is h2's own, to send anything with; `flush` sends what it has queued."""

    def __init__(self, stream: TlsStream, **config: bool) -> None:
        self.stream = stream
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(**config))
        self.connection.initiate_connection()
        self.answers: dict[int, Answer] = {}
        self.goaway: int | None = None
        self.closed = False
        self.reads = True  # gives credit for what it has read

    async def send(self, fields: Fields, body: bytes | None = None) -> int:
        """Send a request (body None: none); return its stream."""
        number = self.connection.get_next_available_stream_id()
        self.answers[number] = Answer()
        self.connection.send_headers(number, fields, end_stream=body is None)
        if body is not None:
            await self.write(number, body, end=True)
        await self.flush()
        return number

    def open(self, fields: Fields) -> int:
        """Queue the head of a request whose body is to follow; return its stream."""
        number = self.connection.get_next_available_stream_id()
        self.answers[number] = Answer()
        self.connection.send_headers(number, fields)
        return number

    async def write(self, number: int, body: bytes, *, end: bool = False) -> None:
        """Send a body as the windows allow."""
        while body:
            room = min(self.connection.local_flow_control_window(number), 16384)
            if room:
                self.connection.send_data(number, body[:room])
                body = body[room:]
            await self.flush()
            if not room:
                await self.receive()
        if end:
            self.connection.end_stream(number)
            await self.flush()

    async def finish(self, *numbers: int) -> list[Answer]:
        """Read until these streams have ended, one way or another."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.closed and not all(self._over(number) for number in numbers):
                await self.receive()
        return [self.answers[number] for number in numbers]

    async def ask(self, fields: Fields, body: bytes | None = None) -> Answer:
        """Send a request and return its answer."""
        (answer,) = await self.finish(await self.send(fields, body))
        return answer

    async def flush(self) -> None:
        if data := self.connection.data_to_send():
            await self.stream.write(data)

    async def receive(self) -> None:
        """Take what comes once."""
        try:
            data = await self.stream.read()
        except OSError:
            data = b""
        self.closed = not data
        for event in self.connection.receive_data(data) if data else ():
            self._take(event)
        if not self.closed:
            with contextlib.suppress(OSError):  # closed meanwhile: the next read says so
                await self.flush()

    async def read_to_end(self) -> None:
        """Read until the gateway closes the connection."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.closed:
                await self.receive()

    def _over(self, number: int) -> bool:
        return self.answers[number].ended or self.answers[number].reset is not None

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = int(event.error_code or 0)
        answer = self.answers.get(getattr(event, "stream_id", 0))
        if answer is None:
            return
        if isinstance(event, h2.events.ResponseReceived):
            fields = {k.decode(): v.decode() for k, v in event.headers}
            answer.status, answer.headers = int(fields[":status"]), fields
        elif isinstance(event, h2.events.InformationalResponseReceived):
            answer.informational.append(int(dict(event.headers)[b":status"]))
        elif isinstance(event, h2.events.DataReceived):
            answer.body += event.data
            if self.reads:
                size = event.flow_controlled_length
                self.connection.acknowledge_received_data(size, event.stream_id)
        elif isinstance(event, h2.events.TrailersReceived):
            answer.trailers = {k.decode(): v.decode() for k, v in event.headers}
        elif isinstance(event, h2.events.StreamEnded):
            answer.ended = True
        elif isinstance(event, h2.events.StreamReset):
            answer.reset = int(event.error_code)


@contextlib.asynccontextmanager
async def h2_client(lab: Lab, name: str, port: int, **config: bool) -> AsyncIterator[H2Client]:
    """Connect to `name` as a client of HTTP/2 in the guest."""
    address = await lab.address_of(name)
    async with lab.tls(address, port, name, alpn=["h2", "http/1.1"]) as stream:
        assert stream.protocol == "h2"
        yield H2Client(stream, **config)


def fields(authority: str, path: str = "/", method: str = "GET", **more: str) -> Fields:
    """Return the fields of a request."""
    pseudo = {":method": method, ":scheme": "https", ":authority": authority, ":path": path}
    return [*pseudo.items(), *((name.replace("_", "-"), value) for name, value in more.items())]


# The server.


@dataclass
class H2Seen:
    """A request that reached the server."""

    fields: list[tuple[bytes, bytes]]
    body: bytes = b""
    ended: bool = False
    reset: int | None = None
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def get(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.fields if key == name), None)


@dataclass
class H2Server:
    """A server, and what reached it. `answer` is called for the head, and for the end, of a request."""

    port: int = 0
    connections: int = 0
    requests: list[H2Seen] = field(default_factory=list)
    push_enabled: int | None = None
    transports: list[asyncio.Transport] = field(default_factory=list)


class Call:
    """One request at the server, for the test's handler."""

    def __init__(self, server: _Protocol, number: int, seen: H2Seen) -> None:
        self.seen = seen
        self.number = number
        self.connection = server.connection
        self._server = server

    @property
    def path(self) -> str:
        return (self.seen.get(b":path") or b"").decode()

    def head(self, status: int = 200, *, end: bool = False, **more: str) -> None:
        named = [(name.replace("_", "-"), value) for name, value in more.items()]
        self.connection.send_headers(
            self.number, [(":status", str(status)), *named], end_stream=end
        )
        self._server.flush()

    def data(self, body: bytes, *, end: bool = False) -> None:
        self.connection.send_data(self.number, body, end_stream=end)
        self._server.flush()

    def trailers(self, **more: str) -> None:
        named = [(name.replace("_", "-"), value) for name, value in more.items()]
        self.connection.send_headers(self.number, named, end_stream=True)
        self._server.flush()

    def reset(self, code: int) -> None:
        self.connection.reset_stream(self.number, code)
        self._server.flush()

    def flush(self) -> None:
        self._server.flush()

    def raw(self, data: bytes) -> None:
        self._server.transport.write(data)


Handler = Callable[[Call, bool], None]


def echo(call: Call, ended: bool) -> None:
    """Answer with the body, or with the path where there is none."""
    if ended:
        body = call.seen.body or call.path.encode()
        call.head(200, content_length=str(len(body)))
        call.data(body, end=True)


class _Protocol(asyncio.Protocol):
    def __init__(self, server: H2Server, handler: Handler) -> None:
        self._seen = server
        self._handler = handler
        self._calls: dict[int, Call] = {}
        self.transport: asyncio.Transport
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._seen.transports.append(transport)
        self._seen.connections += 1
        self.connection.initiate_connection()
        self.flush()

    def data_received(self, data: bytes) -> None:
        for event in self.connection.receive_data(data):
            self._take(event)
        self.flush()

    def flush(self) -> None:
        if data := self.connection.data_to_send():
            self.transport.write(data)

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RemoteSettingsChanged):
            self._seen.push_enabled = self.connection.remote_settings.enable_push
        call = self._calls.get(getattr(event, "stream_id", 0) or 0)
        if isinstance(event, h2.events.RequestReceived):
            seen = H2Seen([(bytes(k), bytes(v)) for k, v in event.headers])
            self._seen.requests.append(seen)
            call = self._calls[event.stream_id] = Call(self, event.stream_id, seen)
            if event.stream_ended is None:
                self._handler(call, False)
        elif call is None:
            pass
        elif isinstance(event, h2.events.DataReceived):
            call.seen.body += event.data
            size = event.flow_controlled_length
            self.connection.acknowledge_received_data(size, event.stream_id)
        elif isinstance(event, h2.events.TrailersReceived):
            call.seen.trailers = [(bytes(k), bytes(v)) for k, v in event.headers]
        elif isinstance(event, h2.events.StreamReset):
            call.seen.reset = int(event.error_code)
        elif isinstance(event, h2.events.StreamEnded):
            call.seen.ended = True
            self._handler(call, True)


@contextlib.asynccontextmanager
async def h2_server(
    handler: Handler = echo, names: Sequence[str] = ("api.test",), alpn: Sequence[str] = ("h2",)
) -> AsyncIterator[H2Server]:
    """Serve HTTP/2 over TLS on 127.0.0.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    SERVER_CA.issue_cert(*names).configure_cert(context)
    context.set_alpn_protocols(alpn)
    seen = H2Server()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Protocol(seen, handler), "127.0.0.1", 0, ssl=context)
    seen.port = server.sockets[0].getsockname()[1]
    try:
        yield seen
    finally:
        server.close()
        for transport in seen.transports:
            transport.abort()  # as tests.support.tcp does
