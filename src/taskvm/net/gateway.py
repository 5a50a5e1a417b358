"""The network of one sandbox: serves the guest's `taskvm.net` port (docs/protocol-control.md).

Owns every task of every connection. A connection that fails takes nothing else with it; a guest
that breaks the port's rules loses the port; cancelling `run` ends everything.

Rule 1: what the guest can make us hold is bounded: connections, their windows, and answers it does
        not read.
Rule 2: frames of an unknown stream are late ones of a stream that we reset, and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from taskvm.egress.boundsecret import BoundSecret
from taskvm.egress.oversight import Oversight
from taskvm.egress.passthrough import NOTHING, Passthrough
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.errors import SandboxLostError
from taskvm.net.auditlog import AuditLog
from taskvm.net.connection import Destination, GuestConnection
from taskvm.net.egress import Egress
from taskvm.net.ingress import Ingress
from taskvm.net.keyring import Keyring
from taskvm.net.names import SyntheticNames
from taskvm.net.nameserver import NameServer
from taskvm.net.resolver import Resolver
from taskvm.net.streams import GuestStream
from taskvm.net.upstream import Dialer
from taskvm.port import FramePort, Inlet, Outlet, StreamReset
from taskvm.wire.connect import decode_connect
from taskvm.wire.frames import GUEST_STREAM_BIT, Frame, FrameType, decode_u32, encode_u32

if TYPE_CHECKING:
    from taskvm.net.certs import CertificateAuthority

MAX_CONNECTIONS = 256
MAX_QUERIES = 256  # DNS queries that wait for an answer (protocol page: the oldest is dropped)
MAX_EARLY_FRAMES = 256  # that come before `run`
# Refused connections whose RESET waits for the port. One read of ours can hold thousands of OPENs.
MAX_REFUSED = 65_536


class GatewayState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the host knows of a guest's net port at rest: the open streams, and the names it has addresses for."""

    streams: list[int] = []
    used: int = 0
    names: list[str] = []


_logger = logging.getLogger(__name__)


class _Stream:
    """An open stream: where it goes, its two flows and the task that serves it."""

    def __init__(self, port: FramePort, number: int, destination: Destination) -> None:
        self.destination = destination
        self.inlet = Inlet(port, number, 0)
        self.outlet = Outlet(port, number, 0)
        self.task: asyncio.Task[None] | None = None


class Gateway:
    """Mediates what leaves one sandbox. It owns the port's callbacks from its creation on.

    `keyring` has its secrets. `ingress` has the streams that the host opens; it may be used before
    `run`, and ends with it. `saved` continues what a saved guest knows: its names keep their
    addresses; its connections are `reset`. `is_running` tells an exec that runs from a number that the
    guest made up.
    """

    def __init__(
        self,
        port: FramePort,
        *,
        policy: Policy,
        secrets: Sequence[BoundSecret],
        audit: AuditLog,
        ca: CertificateAuthority,
        resolver: Resolver,
        extra_ca_files: Iterable[str | os.PathLike[str]] = (),
        passthrough: Passthrough = NOTHING,
        saved: GatewayState | None = None,
        oversight: Oversight | None = None,
        is_running: Callable[[int], bool] = lambda number: False,
    ) -> None:
        saved = saved or GatewayState()
        self.ingress: Ingress = Ingress(port, audit, used=saved.used)
        self.names: SyntheticNames = SyntheticNames(saved.names)
        self.keyring: Keyring = Keyring(secrets)
        dialer = Dialer(policy, resolver, extra_ca_files)
        self._egress = Egress(
            policy, self.keyring, audit, ca, dialer, self.names, passthrough, oversight or Oversight(),
            widen=lambda host: self.change_policy(self.policy.allowing(host)),
        )  # fmt: skip
        self._nameserver = NameServer(self._egress.judge_name, self.names, audit)
        self._audit = audit
        self._is_running = is_running
        self._port = port
        self._streams: dict[int, _Stream] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._queries: deque[tuple[int, bytes]] = deque(maxlen=MAX_QUERIES)
        self._refused: deque[tuple[int, Destination]] = deque()
        self._something_to_send = asyncio.Event()
        self._lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._early: list[Frame] = []
        port.on_frame = self._on_frame
        port.on_lost = self._on_lost

    async def run(self) -> None:
        """Serve until the port is lost, then raise why: SandboxLostError, GuestProtocolError."""
        try:
            reason = await self._serve_port()
        finally:
            await self.ingress.aclose()
            await self._egress.aclose()
        raise reason

    async def _serve_port(self) -> Exception:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            answering = tasks.create_task(self._send_answers())
            early, self._early = self._early, []
            for frame in early:
                self._on_frame(frame)
            reason = await asyncio.shield(self._lost)
            answering.cancel()
            for stream in list(self._streams.values()):
                if stream.task is not None:
                    stream.task.cancel()
        return reason

    @property
    def connections(self) -> int:
        """How many connections are open, the guest's and those into it."""
        return len(self._streams) + self.ingress.connections

    @property
    def policy(self) -> Policy:
        """What it judges by now."""
        return self._egress.policy

    def change_policy(self, policy: Policy) -> None:
        """Judge by `policy` from now on, and cut what it might not have allowed, before anything else runs."""
        before = self._egress.policy
        self._egress.change_policy(policy)
        self._cut(
            lambda host, port: not before.keeps(policy, host, port),
            "policy-changed", "the policy was changed while the connection was open",
        )  # fmt: skip

    def put_secret(self, secret: Secret) -> str:
        """Add a secret, or give the one of its name another value and other hosts; return its placeholder.

        Connections to hosts that it had, and has no more, are cut. Raises UsageError for a host that is not allowed.
        """
        before = self.keyring.find(secret.name)
        placeholder = self.keyring.put(self.policy, secret)
        after = self.keyring.find(secret.name)
        if before is not None and after is not None:
            self._cut(
                lambda host, port: before.is_of(host, port) and not after.is_of(host, port),
                "secret-changed", f"the host was taken from the secret {secret.name}",
            )  # fmt: skip
        return placeholder

    def revoke_secret(self, name: str) -> None:
        """Let a secret go nowhere from now on, and cut the connections to its hosts: a request may be on its way
        with the value. Raises UsageError for one that is not there.
        """
        bound = self.keyring.revoke(name)
        self._cut(
            bound.is_of,
            "secret-revoked", f"the secret {name} was revoked while the connection was open",
        )  # fmt: skip

    def _cut(self, is_meant: Callable[[str, int], bool], rule: str, reason: str) -> None:
        """End what is open to the hosts that are meant, before anything else runs."""
        for number, stream in self._streams.items():
            address, port = stream.destination.address, stream.destination.port
            host = self.names.name_at(address) or str(address)
            if is_meant(host, port) and stream.task is not None:
                self._audit.record(
                    "connect", "deny", rule=rule, connection=number, exec=stream.destination.exec,
                    host=host, port=port, reason=reason,
                )  # fmt: skip
                stream.task.cancel()

    # Saved guests.

    def export(self) -> GatewayState:
        """Return the state of a port at rest."""
        refused = [number for number, _ in self._refused]
        return GatewayState(
            streams=[*self._streams, *refused, *self.ingress.numbers],
            used=self.ingress.highest,
            names=list(self.names.export()),
        )

    def reset(self, streams: Iterable[int]) -> None:
        """Break off connections of the saved guest: nobody is at their other end."""
        for number in streams:
            self._port.send(FrameType.RESET, 0, number, encode_u32(errno.ECONNRESET))

    # Frames of the guest.

    def _on_frame(self, frame: Frame) -> None:
        if not frame.stream & GUEST_STREAM_BIT:
            self.ingress.take(frame)
        elif self._tasks is None:
            self._hold(frame)
        elif frame.type is FrameType.OPEN:
            self._open(frame)
        elif frame.type is FrameType.DATAGRAM:
            self._queries.append((frame.stream, bytes(frame.payload)))
            self._something_to_send.set()
        elif frame.type in _FLOW_FRAMES and frame.channel == 0:
            self._flow(frame)
        else:
            self._port.fail(f"{frame.type.name} on channel {frame.channel} of the net port")

    def _flow(self, frame: Frame) -> None:
        stream = self._streams.get(frame.stream)
        if stream is None:
            return
        if frame.type is FrameType.DATA:
            # Copied: a view would keep the whole read it came in, for as long as it is unread.
            stream.inlet.feed(bytes(frame.payload))
        elif frame.type is FrameType.END:
            stream.inlet.feed_end()
        elif frame.type is FrameType.CREDIT:
            stream.outlet.feed_credit(decode_u32(frame.payload))
        else:
            self._reset(stream, decode_u32(frame.payload))

    def _reset(self, stream: _Stream, reason: int) -> None:
        error = StreamReset(reason)
        stream.inlet.fail(error)
        stream.outlet.fail(error)
        if stream.task is not None:
            stream.task.cancel()

    def _hold(self, frame: Frame) -> None:
        if len(self._early) >= MAX_EARLY_FRAMES:
            self._port.fail("too many frames before the sandbox's network was started")
        self._early.append(Frame(frame.type, frame.channel, frame.stream, bytes(frame.payload)))

    def _open(self, frame: Frame) -> None:
        if frame.stream in self._streams:
            self._port.fail(f"OPEN of stream {frame.stream}, which is open")
            return
        try:
            request = decode_connect(frame.payload)
            address = ipaddress.IPv4Address(request.addr)
        except (ValueError, msgspec.MsgspecError) as error:
            self._port.fail(f"malformed OPEN on the net port: {type(error).__name__}")
            return
        # The guest's word: it may name another of its execs, and nothing is decided by it.
        number = request.exec if self._is_running(request.exec) else 0
        self._connect(frame.stream, Destination(address, request.port, number))

    def _connect(self, number: int, destination: Destination) -> None:
        assert self._tasks is not None, "frames are held until run has started"
        if len(self._streams) >= MAX_CONNECTIONS:
            self._refuse(number, destination)
            return
        stream = self._streams[number] = _Stream(self._port, number, destination)
        stream.task = self._tasks.create_task(
            self._serve(number, stream, destination), name=f"egress {number:#x}"
        )
        # Not in the task itself: one that is cancelled before it starts runs none of its code.
        stream.task.add_done_callback(lambda _: self._streams.pop(number, None))

    # Answers, which wait while the guest does not read.

    def _refuse(self, number: int, destination: Destination) -> None:
        if len(self._refused) >= MAX_REFUSED:
            self._port.fail("the guest opens connections and does not read the answers")
            return
        self._refused.append((number, destination))
        self._something_to_send.set()

    async def _send_answers(self) -> None:
        with contextlib.suppress(SandboxLostError):  # run has been told
            while True:
                await self._something_to_send.wait()
                await self._port.wait_writable()
                # One read of ours can hold thousands of queries, each 30 to 80 microseconds' work:
                # other sandboxes have their turn in between.
                await asyncio.sleep(0)
                self._send_one()

    def _send_one(self) -> None:
        if self._refused:
            number, destination = self._refused.popleft()
            self._audit.record(
                "connect", "deny", rule="connection-limit", connection=number, exec=destination.exec,
                reason=f"{MAX_CONNECTIONS} connections are open",
                address=str(destination.address), port=destination.port,
            )  # fmt: skip
            self._port.send(FrameType.RESET, 0, number, encode_u32(errno.EAGAIN))
        elif self._queries:
            number, query = self._queries.popleft()
            answer = self._nameserver.answer(query)
            if answer:
                self._port.send(FrameType.DATAGRAM, 0, number, answer)
        else:
            self._something_to_send.clear()

    # Connections.

    async def _serve(self, number: int, stream: _Stream, destination: Destination) -> None:
        guest = GuestStream(stream.inlet, stream.outlet)
        try:
            await self._port.wait_writable()
            self._port.send(FrameType.REPLY, 0, number, _EMPTY_MAP)
            await GuestConnection(self._egress, guest, destination, number).run()
        except (OSError, SandboxLostError):
            pass  # the guest's side is gone: nobody is left to tell
        except Exception:
            # Our own bug: this connection ends, the sandbox's others go on.
            _logger.exception("connection %#x of the guest failed", number)
            self._audit.record(
                "connect",
                "error",
                connection=number,
                exec=destination.exec,
                reason="internal error",
            )
        finally:
            with contextlib.suppress(SandboxLostError):
                guest.abort()

    def _on_lost(self, reason: Exception) -> None:
        self.ingress.fail(reason)
        if not self._lost.done():
            self._lost.set_result(reason)


_FLOW_FRAMES = frozenset({FrameType.DATA, FrameType.END, FrameType.CREDIT, FrameType.RESET})
_EMPTY_MAP = msgspec.msgpack.encode({})
