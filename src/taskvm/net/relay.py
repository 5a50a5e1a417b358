"""HTTP/1.1 between the guest and one origin: one judged request after another, streamed both ways.

Rule 1: a request is judged, recorded and complete in its head before its first byte leaves.
Rule 2: one upstream connection at a time, for this guest connection alone; it is kept while it is
        idle and quiet.
Rule 3: a message that breaks off on one side breaks off on the other; it never looks complete.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import h11

from taskvm.audit import Verdict
from taskvm.errors import UpstreamError
from taskvm.net.egress import UNRECORDED, Refusal, Session
from taskvm.net.judge import Judge
from taskvm.net.streams import ByteStream
from taskvm.net.upstream import AddressRefused, Upstream
from taskvm.wire.http1 import (
    MAX_HEAD,
    HttpRefused,
    RequestHead,
    may_have_trailer,
    render_refusal,
    response_headers,
    trailer_headers,
)

HEAD_TIMEOUT_S = 30.0  # for a request's head, from its first wait
IDLE_TIMEOUT_S = 120.0  # between requests
REFUSAL_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 600.0  # without a byte in either direction; models think for minutes


@dataclass(slots=True)
class _Exchange:
    """What is counted of one request and its response."""

    head: RequestHead
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


class HttpRelay:
    """Serves one guest connection. With `denied`, its first request gets that for an answer."""

    def __init__(self, session: Session, guest: ByteStream, denied: Refusal | None = None) -> None:
        self._session = session
        self._guest = guest
        self._judge = Judge(session, denied)
        self._client = h11.Connection(h11.SERVER, MAX_HEAD)
        self._server = h11.Connection(h11.CLIENT, MAX_HEAD)
        self._upstream: Upstream | None = None
        self._method = b""
        self._deadline = asyncio.timeout(None)

    async def run(self) -> None:
        """Serve requests until either side closes or one is refused.

        Raises OSError when the guest is gone.
        """
        try:
            wait_s = HEAD_TIMEOUT_S
            while await self._serve_one(wait_s):
                wait_s = IDLE_TIMEOUT_S
        finally:
            self._drop_upstream()

    async def _serve_one(self, wait_s: float) -> bool:
        """Serve one request; say whether another may follow."""
        head: RequestHead | None = None
        try:
            request = await self._read_request(wait_s)
            if request is None:
                return False
            head = self._judge.admit(request)
            upstream = await self._connect()
        except Refusal as refusal:
            await self._refuse(refusal)
            return False
        return await self._forward(head, upstream)

    # Reading and judging a request.

    async def _read_request(self, wait_s: float) -> h11.Request | None:
        try:
            async with asyncio.timeout(wait_s):
                event = await _next_event(self._client, self._guest)
        except TimeoutError:
            return None
        except h11.RemoteProtocolError as error:
            # h11's own words quote the guest's bytes: they stay out of the log and the answer.
            raise self._judge.refuse_unread(error.error_status_hint) from error
        if not isinstance(event, h11.Request):
            return None
        self._method = event.method
        return event

    # The connection to the server.

    async def _connect(self) -> Upstream:
        if self._upstream is not None and self._upstream.is_quiet():
            return self._upstream
        self._drop_upstream()
        try:
            self._upstream = await self._session.egress.dialer.connect(self._session.origin)
        except AddressRefused as error:
            decision = error.decision
            self._session.record(
                "connect",
                "deny",
                rule=decision.rule,
                reason=decision.reason,
                address=str(error.address),
            )
            raise Refusal.of(decision) from error
        except UpstreamError as error:
            self._session.record("connect", "error", reason=str(error))
            raise Refusal(502, "upstream_failed", "", error.cause) from error
        up = self._upstream
        if not self._session.record("connect", "allow", rule=up.rule, address=up.address):
            raise Refusal.of(UNRECORDED)
        self._server = h11.Connection(h11.CLIENT, MAX_HEAD)
        return up

    def _drop_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()

    # Forwarding.

    async def _forward(self, head: RequestHead, upstream: Upstream) -> bool:
        exchange = _Exchange(head)
        verdict: Verdict = "error"
        reason = "the guest's connection broke off"
        try:
            await self._exchange(exchange, upstream)
            verdict, reason = "allow", ""
        except UpstreamError as error:
            reason = error.cause
            await self._answer_broken(exchange, error)
            return False
        except Refusal as refusal:
            verdict, reason = "deny", refusal.reason
            self._guest.abort()
            return False
        finally:
            self._session.record(
                "response", verdict, reason=reason, status=exchange.status,
                bytes_up=exchange.bytes_up, bytes_down=exchange.bytes_down,
                duration_ms=round((time.monotonic() - exchange.started) * 1000),
            )  # fmt: skip
            if verdict != "allow":
                self._drop_upstream()
        return self._prepare_next()

    async def _exchange(self, exchange: _Exchange, upstream: Upstream) -> None:
        """Send the request and relay the response; the two bodies flow at once."""
        try:
            async with asyncio.timeout(STALL_TIMEOUT_S) as self._deadline:
                with _server_errors("send the request"):
                    await upstream.stream.write(self._server.send(_build(exchange.head)))
                async with asyncio.TaskGroup() as group:
                    upload = group.create_task(self._send_body(exchange, upstream))
                    await asyncio.sleep(0)  # a request without a body ends before its answer
                    await self._relay_response(exchange, upstream)
                    upload.cancel()  # an answer before the request's end is final; we close then
        except TimeoutError as error:
            raise UpstreamError("wait for the server", "nothing moved for too long") from error
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    async def _send_body(self, exchange: _Exchange, upstream: Upstream) -> None:
        while True:
            try:
                event = await _next_event(self._client, self._guest)
            except h11.RemoteProtocolError as error:
                raise ConnectionResetError("the guest's request broke off") from error
            if isinstance(event, h11.Data):
                exchange.bytes_up += len(event.data)
            elif isinstance(event, h11.EndOfMessage):
                event = h11.EndOfMessage(headers=self._judge.admit_trailer(exchange.head, event))
            else:
                raise ConnectionResetError("the guest closed within its request")
            self._moved()
            try:
                await upstream.stream.write(self._server.send(event))
            except OSError:
                return  # the server reads no more; what it answers decides
            if isinstance(event, h11.EndOfMessage):
                return

    async def _relay_response(self, exchange: _Exchange, upstream: Upstream) -> None:
        chunked = False
        while True:
            with _server_errors("read the response"):
                event = await _next_event(self._server, upstream.stream)
            self._moved()
            if isinstance(event, h11.InformationalResponse):
                await self._relay_informational(event)
            elif isinstance(event, h11.Response):
                chunked = may_have_trailer(event.headers)
                await self._start_response(exchange, event)
            elif isinstance(event, h11.Data):
                exchange.bytes_down += len(event.data)
                await self._send(h11.Data(data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                may_follow = chunked and self._client.their_http_version == b"1.1"
                trailer = trailer_headers(event.headers.raw_items()) if may_follow else []
                await self._send(h11.EndOfMessage(headers=trailer))
                return
            else:
                raise UpstreamError("read the response", "the server closed without an answer")

    async def _relay_informational(self, event: h11.InformationalResponse) -> None:
        if event.status_code == 101:
            raise UpstreamError("read the response", "the server switched protocols unasked")
        if self._client.their_http_version == b"1.1":
            await self._send(
                h11.InformationalResponse(
                    status_code=event.status_code, headers=_checked(event), reason=event.reason
                )
            )

    async def _start_response(self, exchange: _Exchange, event: h11.Response) -> None:
        headers = _checked(event)
        pipelined = bool(self._client.trailing_data[0]) and self._client.their_state is h11.DONE
        if pipelined:
            # Refused by closing after this answer; a client that pipelines asks again (RFC 9112
            # section 9.3.2).
            self._session.record("request", "deny", rule="http", reason="a request was pipelined")
        if pipelined or self._client.they_are_waiting_for_100_continue:
            headers.append((b"Connection", b"close"))
        exchange.status = event.status_code
        await self._send(
            h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        )

    async def _send(self, event: h11.Event) -> None:
        try:
            data = self._client.send(event)
        except h11.LocalProtocolError as error:
            raise UpstreamError(
                "relay the response", "the server's message is malformed"
            ) from error
        if data:
            await self._guest.write(data)
        self._moved()

    def _moved(self) -> None:
        self._deadline.reschedule(asyncio.get_running_loop().time() + STALL_TIMEOUT_S)

    def _prepare_next(self) -> bool:
        """Make both sides ready for another request; say whether the guest's side is."""
        if (self._server.our_state, self._server.their_state) == (h11.DONE, h11.DONE):
            self._server.start_next_cycle()
        else:
            self._drop_upstream()
        if (self._client.our_state, self._client.their_state) != (h11.DONE, h11.DONE):
            return False
        self._client.start_next_cycle()
        return True

    # Refusing.

    async def _refuse(self, refusal: Refusal) -> None:
        """Answer with the refusal; the connection is over after it."""
        body = render_refusal(
            refusal.kind, self._session.origin.host, refusal.rule, refusal.reason, refusal.hint
        )
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Connection", "close"),
        ]
        try:
            data = self._client.send(h11.Response(status_code=refusal.status, headers=headers))
            if self._method != b"HEAD":
                data += self._client.send(h11.Data(data=body))
        except h11.LocalProtocolError:
            self._guest.abort()  # the guest is in the middle of something that no answer fits
            return
        # A guest that reads nothing must not keep the connection for ever.
        async with asyncio.timeout(REFUSAL_TIMEOUT_S):
            await self._guest.write(data)

    async def _answer_broken(self, exchange: _Exchange, error: UpstreamError) -> None:
        if exchange.status:
            self._guest.abort()
        else:
            await self._refuse(Refusal(502, "upstream_failed", "", error.cause))


async def _next_event(connection: h11.Connection, stream: ByteStream) -> object:
    """Return the next event that the peer's bytes make."""
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await stream.read())
    return event


def _build(head: RequestHead) -> h11.Request:
    try:
        return h11.Request(method=head.method, target=head.target, headers=head.headers)
    except h11.LocalProtocolError:
        # `from None`: h11 quotes the header, and a secret's value may stand in it.
        raise Refusal(400, "bad_request", "http", "a header cannot be sent") from None


def _checked(response: h11.Response | h11.InformationalResponse) -> list[tuple[bytes, bytes]]:
    try:
        return response_headers(response)
    except HttpRefused as error:
        raise UpstreamError("read the response", error.reason) from error


@contextmanager
def _server_errors(operation: str) -> Iterator[None]:
    """Map what goes wrong with the server's connection to UpstreamError."""
    try:
        yield
    except h11.RemoteProtocolError as error:
        raise UpstreamError(operation, "the server does not speak valid HTTP/1.1") from error
    except TimeoutError:
        raise  # the stall timer's
    except OSError as error:
        raise UpstreamError(operation, "the server's connection broke off") from error
