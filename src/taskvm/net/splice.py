"""TLS that is not intercepted: bytes between the guest and a server, unread.

Rule: whom it is for is judged all the same: the name was allowed, the ClientHello names it in clear,
and what is dialled is an address that passed.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from taskvm.egress.audit import Verdict
from taskvm.errors import UpstreamError
from taskvm.net.egress import UNRECORDED, Refusal, Session
from taskvm.net.streams import ByteStream, SocketStream
from taskvm.net.upstream import AddressRefused
from taskvm.net.upstreams import refuse_address, refuse_unreachable
from taskvm.wire.tls import ClientHello

IDLE_TIMEOUT_S = 3600.0  # without a byte in either direction


async def pass_through(session: Session, guest: ByteStream, hello: ClientHello) -> Refusal | None:
    """Carry TLS to its server unread, to its end; or return why not, when nothing has left.

    Raises OSError when one side breaks off.
    """
    origin, egress = session.origin, session.egress
    if hello.encrypted:  # of what we do not intercept, the outer name says nothing
        return _refuse(session, "the TLS handshake may hide another server's name (ECH)")
    if not egress.policy.allows_all(origin.host, origin.port):
        return _refuse(session, "not every request to the host is allowed any more")
    try:
        sock, address, rule = await egress.dialer.reach(origin)
    except AddressRefused as error:
        return refuse_address(session, error)
    except UpstreamError as error:
        return refuse_unreachable(session, error)
    server = SocketStream(sock)
    try:
        recorded = session.record("connect", "allow", rule=rule, address=address)
        reason = "passed through: not intercepted"
        if not recorded or not session.record("tls", "allow", rule="passthrough", reason=reason):
            return Refusal.of(UNRECORDED)
        await _carry(session, Splice(guest, server))
    finally:
        server.abort()
    return None


async def _carry(session: Session, splice: Splice) -> None:
    began = time.monotonic()
    verdict: Verdict = "error"
    try:
        await splice.run()
        verdict = "allow"
    finally:
        session.record(
            "tls", verdict, rule="passthrough", reason="the passage has ended",
            bytes_up=splice.bytes_up, bytes_down=splice.bytes_down,
            duration_ms=round((time.monotonic() - began) * 1000),
        )  # fmt: skip


def _refuse(session: Session, reason: str) -> Refusal:
    session.record("tls", "deny", rule="passthrough", reason=reason)
    return Refusal(403, "egress_denied", "passthrough", reason)


@dataclass(slots=True)
class Splice:
    """Carries both directions to their ends, and counts."""

    guest: ByteStream
    server: ByteStream
    bytes_up: int = 0
    bytes_down: int = 0
    _deadline: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))

    async def run(self) -> None:
        """Carry until both directions have ended. Raises OSError when one breaks, or nothing moves."""
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S) as self._deadline:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._carry_up())
                    group.create_task(self._carry_down())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    async def _carry_up(self) -> None:
        while data := await self.guest.read():
            self.bytes_up += len(data)
            await self._pass_on(self.server, data)
        await self.server.end()

    async def _carry_down(self) -> None:
        while data := await self.server.read():
            self.bytes_down += len(data)
            await self._pass_on(self.guest, data)
        await self.guest.end()

    async def _pass_on(self, stream: ByteStream, data: bytes) -> None:
        self._moved()
        await stream.write(data)
        self._moved()

    def _moved(self) -> None:
        self._deadline.reschedule(asyncio.get_running_loop().time() + IDLE_TIMEOUT_S)
