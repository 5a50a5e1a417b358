"""Requests between the guest and one origin: judged, recorded, streamed both ways.

Knows nothing of HTTP's versions: `net.http1` and `net.http2` carry the exchanges.

Rule 1: a request is judged, recorded and complete in its head before its first byte leaves.
Rule 2: a message that breaks off on one side breaks off on the other; it never looks complete.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Protocol

from taskvm.egress.audit import Verdict
from taskvm.errors import UpstreamError
from taskvm.net.egress import Refusal, Session
from taskvm.net.exchange import GuestExchange, ServerExchange, StreamEnded, Unanswered
from taskvm.net.judge import Admitted, Answered, Judge
from taskvm.wire.message import (
    Header,
    HttpRefused,
    ResponseHead,
)

REFUSAL_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 600.0  # without a byte in either direction; models think for minutes
WEBSOCKET_TIMEOUT_S = 3600.0  # the same, of a WebSocket
_REPEATABLE = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})  # RFC 9110, 9.2.2
_STALLED = "nothing moved for too long"


class Upstreams(Protocol):
    """Where exchanges with the origin come from."""

    async def open(self) -> ServerExchange:
        """Return one that nothing was sent on. Raises Refusal."""


@dataclass(slots=True)
class _Count:
    """What is counted of one request and its response."""

    started: float = field(default_factory=time.monotonic)
    status: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


class Relay:
    """Serves the requests of one guest connection.

    With `denied`, each request gets that for an answer.
    """

    def __init__(
        self, session: Session, upstreams: Upstreams, denied: Refusal | None = None
    ) -> None:
        self.session = session
        self._upstreams = upstreams
        self._judge = Judge(session, denied)

    async def serve(self, guest: GuestExchange) -> None:
        """Serve one request to its end. Raises OSError when the guest is gone."""
        try:
            admitted = await self._judge.admit(guest.asked)
            server = await self.open()
        except Refusal as refusal:
            await self.refuse(guest, refusal)
            return
        await _Forwarding(self, guest, server, admitted).run()

    async def open(self) -> ServerExchange:
        """Return an exchange with the origin. Raises Refusal."""
        try:
            async with asyncio.timeout(STALL_TIMEOUT_S):
                return await self._upstreams.open()
        except TimeoutError as error:
            self.session.record("connect", "error", reason=_STALLED)
            raise Refusal(502, "upstream_failed", "", _STALLED) from error

    async def refuse_unread(self, guest: GuestExchange, status: int) -> None:
        """Answer bytes that are no request."""
        await self.refuse(guest, self._judge.refuse_unread(status))

    async def refuse_crowded(self, guest: GuestExchange) -> None:
        """Answer a request that there is no room for."""
        await self.refuse(guest, self._judge.refuse_crowded())

    async def admit_trailer(self, fields: list[Header]) -> list[Header]:
        """Return the trailer of a request to send. Raises Refusal."""
        return self._judge.admit_trailer(fields)

    async def admit_response(self, admitted: Admitted, response: ResponseHead) -> Answered:
        """Return the response to send. Raises Refusal."""
        return await self._judge.admit_response(admitted, response)

    async def refuse(self, guest: GuestExchange, refusal: Refusal) -> None:
        """Answer with the refusal, in the same shape whatever was refused."""
        headers, body = refusal.render(self.session.origin.host)
        guest.close_after()
        is_head = guest.asked.method == b"HEAD" or refusal.status in (204, 304)
        # A guest that reads nothing must not keep the connection for ever.
        async with asyncio.timeout(REFUSAL_TIMEOUT_S):
            await guest.send_head(ResponseHead(refusal.status, headers, ended=is_head))
            if not is_head:
                await guest.send(body)
            await guest.end([])


class _Forwarding:
    """One admitted request on its way, and its answer."""

    def __init__(
        self, relay: Relay, guest: GuestExchange, server: ServerExchange, admitted: Admitted
    ) -> None:
        self._relay = relay
        self._guest = guest
        self._server = server
        self._admitted = admitted
        self._head = admitted.head
        self._count = _Count()
        self._deadline = asyncio.timeout(None)
        self._stall_s = STALL_TIMEOUT_S

    async def run(self) -> None:
        verdict: Verdict = "error"
        reason = "the guest's connection broke off"
        try:
            await self._exchange_until_read()
            verdict, reason = "allow", ""
        except UpstreamError as error:
            reason = error.cause
            await self._answer_broken(error)
        except Refusal as refusal:
            verdict, reason = "deny", refusal.reason
            await self._answer_denied(refusal)
        finally:
            self._server.release(complete=verdict == "allow")
            count = self._count
            self._relay.session.record(
                "response", verdict, reason=reason, status=count.status,
                bytes_up=count.bytes_up, bytes_down=count.bytes_down,
                duration_ms=round((time.monotonic() - count.started) * 1000),
            )  # fmt: skip

    async def _exchange_until_read(self) -> None:
        """Do so on another connection where the server closed a used one: the guest knows nothing of those."""
        while True:
            try:
                return await self._exchange()
            except Unanswered:
                if self._head.has_body or self._head.method not in _REPEATABLE:
                    raise
            self._server.release(complete=False)
            self._server = await self._relay.open()

    async def _exchange(self) -> None:
        """Send the request and relay the response; the two bodies flow at once."""
        try:
            async with asyncio.timeout(self._stall_s) as self._deadline:
                await self._server.send_head(self._head)
                if self._head.websocket:
                    await self._exchange_websocket()
                elif self._head.has_body:
                    await self._both(self._relay_response())
                else:
                    await self._relay_response()
        except TimeoutError as error:
            raise UpstreamError("wait for the server", _STALLED) from error
        except HttpRefused as refused:
            raise Refusal(refused.status, "bad_request", "http", refused.reason) from refused

    async def _both(self, answering: Coroutine[None, None, None]) -> None:
        """Let the request's body flow while the response comes."""
        try:
            async with asyncio.TaskGroup() as group:
                upload = group.create_task(self._send_body())
                await answering
                upload.cancel()  # an answer before the request's end is final; we close then
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    async def _send_body(self) -> None:
        body = self._admitted.body
        try:
            while data := await self._guest.read():
                self._count.bytes_up += len(data)
                self._moved()
                await self._send_up(data if body is None else body.feed(data))
            await self._send_up(b"" if body is None else body.finish())
        except UpstreamError:
            return  # the server reads no more; what it answers decides
        trailer = await self._relay.admit_trailer(self._guest.trailer)
        self._moved()
        try:
            await self._server.end(trailer)
        except UpstreamError:
            return

    async def _send_up(self, data: bytes) -> None:
        if data:
            await self._server.send(data)

    async def _relay_response(self) -> None:
        head = await self._next_head()
        while head.status < 200:
            await self._send_informational(head)
            head = await self._next_head()
        await self._finish_response(head)

    async def _finish_response(self, head: ResponseHead) -> None:
        answered = await self._relay.admit_response(self._admitted, head)
        self._count.status = answered.head.status
        await self._guest.send_head(answered.head)
        await self._pipe_down(answered)

    async def _send_informational(self, head: ResponseHead) -> None:
        answered = await self._relay.admit_response(self._admitted, head)
        await self._guest.send_head(answered.head)

    async def _pipe_down(self, answered: Answered) -> None:
        body = answered.body
        while data := await self._server.read():
            self._count.bytes_down += len(data)
            self._moved()
            await self._send_down(data if body is None else body.feed(data))
        await self._send_down(b"" if body is None else body.finish())
        await self._guest.end(answered.trailer(self._server.trailer))

    async def _send_down(self, data: bytes) -> None:
        if data:
            await self._guest.send(data)
            self._moved()

    async def _exchange_websocket(self) -> None:
        head = await self._next_head()
        while head.status < 200 and head.status != 101:
            await self._send_informational(head)
            head = await self._next_head()
        if head.status != 101:
            await self._finish_response(head)
            return
        self._stall_s = WEBSOCKET_TIMEOUT_S
        self._moved()
        await self._both(self._finish_response(head))

    async def _next_head(self) -> ResponseHead:
        head = await self._server.read_head()
        self._moved()
        return head

    def _moved(self) -> None:
        self._deadline.reschedule(asyncio.get_running_loop().time() + self._stall_s)

    # Breaking off.

    async def _answer_broken(self, error: UpstreamError) -> None:
        if self._count.status:
            self._guest.break_off(error.code if isinstance(error, StreamEnded) else None)
        else:
            await self._relay.refuse(self._guest, Refusal(502, "upstream_failed", "", error.cause))

    async def _answer_denied(self, refusal: Refusal) -> None:
        if self._count.status:
            self._guest.break_off()
        else:
            await self._relay.refuse(self._guest, refusal)
