"""The way in: listeners of the host whose connections lead to servers on the guest's loopback.

Rule 1: only the host opens. Nothing that the guest sends makes a listener, a stream or a
        connection; a frame of a stream that was never opened, or that is not due, costs it its
        sandbox.
Rule 2: bytes are carried as they are, each direction to its own end: the end of one (FIN) leaves
        the other open. What broke on one side is broken off on the other (RST).
Rule 3: what is held is bounded: MAX_CONNECTIONS, each with one window and one read.
Rule 4: a `Forward` owns its listener and its connections. The sandbox's end closes them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import struct
import time
from types import TracebackType
from typing import Any, Self

from taskvm.background import Background
from taskvm.egress.audit import Verdict
from taskvm.errors import HostError, SandboxLostError, UsageError
from taskvm.net.auditlog import AuditLog
from taskvm.net.streams import GuestStream, SocketStream
from taskvm.opening import Opening
from taskvm.port import FramePort, Inlet, Outlet, StreamReset
from taskvm.room import keep_room
from taskvm.wire.connect import GUEST_LOOPBACK, ConnectRequest, encode_connect
from taskvm.wire.control import MAX_ERRNO, AnswerError, Done, Failure, decode
from taskvm.wire.frames import GUEST_STREAM_BIT, Frame, FrameType, decode_u32

LOCALHOST = "127.0.0.1"
MAX_CONNECTIONS = 256  # of one sandbox, as for egress
BACKLOG = 256
# The guest's loopback answers at once, unless a server's backlog is full.
CONNECT_TIMEOUT_S = 30.0
# accept(2) goes on failing while descriptors or memory are short.
ACCEPT_RETRY_S = 0.2

_logger = logging.getLogger(__name__)


class Connection:
    """A client of the host and its stream into the guest. `run` returns when both ended, and raises when one broke."""

    def __init__(self, port: FramePort, number: int, client: socket.socket) -> None:
        self.number = number
        self.bytes_up: int = 0
        self.bytes_down: int = 0
        self._port = port
        self._inlet = Inlet(port, number, 0)
        self._outlet = Outlet(port, number, 0)
        self._guest = GuestStream(self._inlet, self._outlet)
        self._client = SocketStream(client)
        loop = asyncio.get_running_loop()
        self._answered: asyncio.Future[OSError | None] = loop.create_future()
        self._broken: asyncio.Future[Exception] = loop.create_future()

    async def dial(self, guest_port: int) -> None:
        """Have the agent connect. Raises OSError with the guest's errno, SandboxLostError."""
        await self._port.wait_writable()
        request = encode_connect(ConnectRequest(GUEST_LOOPBACK, guest_port))
        self._port.send(FrameType.OPEN, 0, self.number, request)
        either: set[asyncio.Future[Any]] = {self._answered, self._broken}
        await asyncio.wait(either, timeout=CONNECT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if self._broken.done():
            raise self._broken.result()
        if not self._answered.done():
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        refusal = self._answered.result()
        if refusal is not None:
            raise refusal

    async def run(self) -> None:
        """Carry the bytes of both directions. Raises OSError, SandboxLostError."""
        try:
            async with asyncio.TaskGroup() as group:
                inward = group.create_task(self._carry_in())
                await self._carry_out()
                # The guest may break off what it has ended only one way; nobody reads its side then.
                either: set[asyncio.Future[Any]] = {inward, self._broken}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if self._broken.done() and not inward.done():
                    raise self._broken.result()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def abort(self) -> None:
        """Break off the guest's side, unless both directions have ended. Idempotent."""
        with contextlib.suppress(SandboxLostError):
            self._guest.abort()

    async def _carry_in(self) -> None:
        while data := await self._client.read():
            await self._guest.write(data)
            self.bytes_down += len(data)
        await self._guest.end()

    async def _carry_out(self) -> None:
        while data := await self._guest.read():
            await self._client.write(data)
            self.bytes_up += len(data)
        await self._client.end()

    # What the guest says.

    def take(self, frame: Frame) -> None:
        """Take a frame of this stream. The guest fails the port by one that is not due."""
        if frame.type is FrameType.RESET:
            self._reset(decode_u32(frame.payload))
        elif (frame.type is FrameType.REPLY) is self._answered.done():
            self._port.fail(f"{frame.type.name} on stream {frame.stream} is not due")
        elif frame.type is FrameType.REPLY:
            self._answer(frame.payload)
        elif frame.type is FrameType.DATA:
            self._inlet.feed(frame.payload)
        elif frame.type is FrameType.END:
            self._inlet.feed_end()
        else:
            self._outlet.feed_credit(decode_u32(frame.payload))

    def fail(self, error: Exception) -> None:
        """The stream is over, for `error`."""
        self._inlet.fail(error)
        self._outlet.fail(error)
        if not self._broken.done():
            self._broken.set_result(error)

    def _answer(self, payload: bytes | memoryview) -> None:
        try:
            answer = decode(payload, Done)
        except AnswerError as error:
            self._port.fail(f"reply to the OPEN of stream {self.number}: {error}")
            return
        refusal = None
        if isinstance(answer, Failure):
            refusal = OSError(answer.errno, f"{os.strerror(answer.errno)} ({answer.call})")
            self.fail(refusal)
        self._answered.set_result(refusal)

    def _reset(self, reason: int) -> None:
        if 0 < reason <= MAX_ERRNO:
            self.fail(StreamReset(reason))
        else:
            self._port.fail(f"RESET of stream {self.number} with the errno {reason}")


class Forward:
    """A listening address of the host that leads to a port of the guest, until `close` or the sandbox's end.

    `host` and `port` are where it listens, `guest_port` where it leads; `str()` is `host:port`. What
    answers there is the untrusted guest: a browser that opens it runs the guest's pages.
    """

    def __init__(self, ingress: Ingress, listener: socket.socket, guest_port: int) -> None:
        self.host: str
        self.port: int
        self.host, self.port = listener.getsockname()[:2]
        self.guest_port: int = guest_port
        self._ingress = ingress
        self._listener = listener
        self._clients: set[socket.socket] = set()
        self._background = Background(_report)
        self._background.start(self._accept(), f"ingress {self}")

    async def close(self) -> None:
        """Stop listening and break off the connections that are open. Idempotent."""
        await self._background.aclose()
        self._listener.close()
        for client in self._clients:  # of tasks that were cancelled before they ran
            _close_hard(client)
        self._clients.clear()
        self._ingress.forget(self)  # last: a close that is cancelled is done again by its owner

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, peer = await loop.sock_accept(self._listener)
            except OSError:  # EMFILE, ENFILE, ENOMEM, or a client that went away
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            self._clients.add(client)
            self._background.start(self._serve(client, peer[:2]), f"ingress {self} {peer}")

    async def _serve(self, client: socket.socket, peer: tuple[str, int]) -> None:
        whole = False
        try:
            whole = await self._ingress.carry(client, peer, self.guest_port)
        finally:
            self._clients.discard(client)
            client.close() if whole else _close_hard(client)


class Ingress:
    """The streams that the host opens on a net port, and the listeners that they come from.

    `used` is the highest number that the host had used when the guest was saved.
    """

    def __init__(self, port: FramePort, audit: AuditLog, *, used: int = 0) -> None:
        self._port = port
        self._audit = audit
        self._forwards: set[Forward] = set()
        self._connections: dict[int, Connection] = {}
        self._last = used
        self._highest = used
        self._lost: Exception | None = None

    @property
    def connections(self) -> int:
        """How many connections into the guest are open."""
        return len(self._connections)

    @property
    def numbers(self) -> list[int]:
        """The streams that are open."""
        return list(self._connections)

    @property
    def highest(self) -> int:
        """The highest number that was used."""
        return self._highest

    def forward(self, guest_port: int, host: str, host_port: int) -> Opening[Forward]:
        """Return what opens a Forward when it is awaited or entered. Raises, then, as `listen`."""

        async def begin() -> Forward:
            return self.listen(guest_port, host, host_port)

        return Opening(begin)

    def listen(self, guest_port: int, host: str = LOCALHOST, host_port: int = 0) -> Forward:
        """Open a listener. Raises UsageError, HostError (the address is in use), SandboxLostError."""
        operation = f"forward {host} port {host_port} to port {guest_port} of the guest"
        _check(operation, guest_port, host, host_port)
        if self._lost is not None:
            raise SandboxLostError(operation, str(self._lost), "Start another sandbox")
        listener = _bind(operation, host, host_port)
        address, port = listener.getsockname()[:2]
        if not self._record("allow", address, port, guest_port, reason="listening"):
            listener.close()
            raise HostError(operation, "the audit log is full or cannot be written")
        forward = Forward(self, listener, guest_port)
        self._forwards.add(forward)
        return forward

    def forget(self, forward: Forward) -> None:
        """Own a forward no more that closes itself."""
        self._forwards.discard(forward)

    async def aclose(self) -> None:
        """Close every forward; no more can be opened. Idempotent."""
        self._lost = self._lost or SandboxLostError("forward a port", "the sandbox was closed")
        for forward in list(self._forwards):
            await forward.close()

    # The port.

    def take(self, frame: Frame) -> None:
        """Take a frame whose stream is not the guest's own."""
        opened = 0 < frame.stream <= self._highest
        if not opened or frame.channel or frame.type not in _FRAMES:
            self._port.fail(
                f"{frame.type.name} on stream {frame.stream}, channel {frame.channel}: "
                "the host has opened none that takes it"
            )
            return
        connection = self._connections.get(frame.stream)
        if connection is not None:  # else a late one of a stream that is over
            connection.take(frame)

    def fail(self, reason: Exception) -> None:
        """The port is lost: every connection breaks, and no more come."""
        self._lost = self._lost or reason
        for connection in list(self._connections.values()):
            connection.fail(reason)

    # Connections.

    async def carry(self, client: socket.socket, peer: tuple[str, int], guest_port: int) -> bool:
        """Serve one accepted connection. False when it did not come to its end on both sides."""
        if not self._admits(client, peer, guest_port):
            return False
        connection = self._open(client)
        started = time.monotonic()
        verdict: Verdict = "error"
        reason = "broken off"
        try:
            await connection.dial(guest_port)
            if self._record("allow", *peer, guest_port, connection=connection.number):
                await connection.run()
                verdict, reason = "allow", "closed"
        except (OSError, SandboxLostError) as error:
            reason = str(error)
        finally:
            del self._connections[connection.number]
            connection.abort()
            self._record(
                verdict, *peer, guest_port, reason=reason, connection=connection.number,
                bytes_up=connection.bytes_up, bytes_down=connection.bytes_down,
                duration_ms=int((time.monotonic() - started) * 1000),
            )  # fmt: skip
        return verdict == "allow"

    def _admits(self, client: socket.socket, peer: tuple[str, int], guest_port: int) -> bool:
        if self._lost is not None:
            return False
        reason = f"{MAX_CONNECTIONS} connections are open"
        if len(self._connections) < MAX_CONNECTIONS:
            if keep_room(client.fileno()):
                return True
            reason = "this process has too many files open"
        self._record("deny", *peer, guest_port, rule="connection-limit", reason=reason)
        return False

    def _open(self, client: socket.socket) -> Connection:
        # A number rests as long as possible: a late frame of its last use would hit the next.
        while True:
            self._last = self._last % (GUEST_STREAM_BIT - 1) + 1
            if self._last not in self._connections:
                break
        self._highest = max(self._highest, self._last)
        connection = self._connections[self._last] = Connection(self._port, self._last, client)
        return connection

    def _record(
        self, verdict: Verdict, address: str, port: int, guest_port: int, **fields: Any
    ) -> bool:
        return self._audit.record(
            "ingress", verdict, address=address, port=port, guest_port=guest_port, **fields
        )


def _check(operation: str, guest_port: int, host: str, host_port: int) -> None:
    if not 0 < guest_port < 65536 or not 0 <= host_port < 65536:
        raise UsageError(operation, "a port is a number from 1 to 65535 (0: any free one)")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise UsageError(operation, "the host is no address", "Pass one, or leave it out") from None


def _bind(operation: str, host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or "it cannot be bound"
        raise HostError(operation, reason, "Choose another address or host_port") from error
    return listener


def _close_hard(client: socket.socket) -> None:
    """Close with RST: an end would pass for all that there was."""
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _report(error: BaseException) -> None:
    # Our own bug: this connection ends, the sandbox's others go on.
    _logger.error("a forwarded connection failed", exc_info=error)


_FRAMES = frozenset(
    {FrameType.REPLY, FrameType.DATA, FrameType.END, FrameType.CREDIT, FrameType.RESET}
)
