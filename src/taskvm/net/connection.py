"""One connection of the guest: what it speaks, and whether it means whom it was made to.

Rule 1: the destination is a synthetic address that this sandbox was given, or an IP literal that a
        rule names.
Rule 2: the name that the connection claims (SNI, Host) is the name that its address was given for.
Rule 3: what is neither HTTP/1 nor TLS is refused: there is nothing to judge it by.
Rule 4: an encrypted server name (ECH) is never read: what counts is the outer one, which the
        certificate that we show has. We have no keys of ECH, so GREASE (browsers send it always) and
        the real thing both continue as if it had not been sent (RFC 9849 section 7).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import ssl
from dataclasses import dataclass

from taskvm.egress.audit import Kind, Verdict
from taskvm.egress.policy import Decision
from taskvm.net.egress import UNRECORDED, Egress, Refusal, Session
from taskvm.net.http1guest import Http1Guest
from taskvm.net.names import SYNTHETIC_NETWORK
from taskvm.net.splice import pass_through
from taskvm.net.streams import ByteStream, GuestStream
from taskvm.net.tlsstream import TlsStream
from taskvm.net.upstream import H1, H2
from taskvm.wire.hostname import parse_address
from taskvm.wire.http1 import looks_like_request
from taskvm.wire.message import Origin, Scheme
from taskvm.wire.ssh import is_ssh, render_disconnect
from taskvm.wire.tls import MAX_CLIENT_HELLO, ClientHello, TlsError, is_tls, parse_client_hello

# Also where the host is denied, which is told in what the client speaks: without KVM, beside a few other programs, git
# reads its certificates for two seconds between its connection and its first byte.
SNIFF_TIMEOUT_S = 10.0
HANDSHAKE_TIMEOUT_S = 15.0
# After our last byte the guest may still be sending; closing at once would cost it our answer.
LINGER_S = 2.0
LINGER_BYTES = 1024 * 1024

_HTTP_ALPN = frozenset({H2.encode(), H1.encode(), b"http/1.0"})


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the guest's program connected to, and the running exec that the guest says it belongs to (0: unknown)."""

    address: ipaddress.IPv4Address
    port: int
    exec: int = 0


class GuestConnection:
    """Serves one connection; `run` returns when it is over, and leaves the stream closed."""

    def __init__(
        self, egress: Egress, stream: GuestStream, destination: Destination, number: int
    ) -> None:
        self._egress = egress
        self._stream = stream
        self._destination = destination
        self._number = number
        self._host, self._decision = self._identify()

    async def run(self) -> None:
        """Serve the connection to its end. Raises OSError when the guest is gone."""
        recorded = self._record_opening()
        if not recorded:
            self._decision = UNRECORDED
        try:
            async with asyncio.timeout(SNIFF_TIMEOUT_S):
                scheme, hello = await self._sniff()
        except (TimeoutError, TlsError, _UnknownProtocolError) as error:
            await self._refuse_protocol(error)
            return
        if scheme == "https":
            await self._serve_tls(hello)
        else:
            await self._serve("http", self._stream, self._host, self._denial())
        await self._close(self._stream)

    def _identify(self) -> tuple[str, Decision]:
        """Return the host that the connection was made to, and whether it may be."""
        address, port = self._destination.address, self._destination.port
        if address not in SYNTHETIC_NETWORK:
            return str(address), self._egress.judge_name(str(address), port)
        name = self._egress.names.name_at(address)
        if name is None:
            reason = "this sandbox was not given the address"
            return str(address), Decision(False, "unknown-address", reason, "Look the name up")
        return name, self._egress.judge_name(name, port)

    # What it speaks.

    async def _sniff(self) -> tuple[Scheme, ClientHello | None]:
        """Look at the first bytes, and put them back."""
        data = b""
        while True:
            received = await self._stream.read(MAX_CLIENT_HELLO)
            if not received:
                raise _UnknownProtocolError("it ended before it said what it is")
            data += received
            if is_tls(data):
                hello = parse_client_hello(data)
                if hello is not None:
                    self._stream.unread(data)
                    return "https", hello
            elif (verdict := looks_like_request(data)) is not None:
                if is_ssh(data):
                    raise _SshError("SSH is not carried: use https, as in git clone https://…")
                if not verdict:
                    raise _UnknownProtocolError("it is neither HTTP/1 nor TLS")
                self._stream.unread(data)
                return "http", None

    async def _refuse_protocol(self, error: Exception) -> None:
        reason = "it said nothing in time" if isinstance(error, TimeoutError) else str(error)
        kind: Kind = "tls" if isinstance(error, TlsError) else "connect"
        self._record(kind, "deny", rule="protocol", reason=f"unknown protocol: {reason}")
        if isinstance(error, _SshError):
            decision = self._decision
            said = reason if decision.allowed else f"{decision.reason}. {decision.hint}"
            await self._stream.write(render_disconnect(said))
            await self._stream.end()
            await self._close(self._stream)
        else:
            self._stream.abort(errno.ECONNREFUSED)

    # TLS.

    async def _serve_tls(self, hello: ClientHello | None) -> None:
        assert hello is not None, "https is sniffed by its ClientHello"
        denied = self._denial() or self._judge_hello(hello)
        if denied is None and self._egress.passthrough.names(self._host, self._destination.port):
            session = self._session("https", self._host)
            denied = await pass_through(session, self._stream, hello)
            if denied is None:
                return
        # A client verifies against the name that it sent: a refusal in TLS must have that name.
        name = hello.server_name or self._host
        stream = TlsStream(self._stream, self._egress.ca.server_context(name), server_side=True)
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await stream.handshake()
        except (ssl.SSLError, TimeoutError) as error:
            reason = getattr(error, "reason", None) or "the handshake did not end"
            self._record("tls", "error", reason=f"the guest's TLS failed: {reason}")
            self._stream.abort()
            return
        if denied is None:
            self._record("tls", "allow", rule=self._decision.rule, reason=stream.version)
        await self._serve("https", stream, self._host, denied)

    def _judge_hello(self, hello: ClientHello) -> Refusal | None:
        is_literal = parse_address(self._host) is not None
        reason = ""
        if is_literal and hello.server_name is not None:
            reason = "the connection was made to an address, and names a server"
        elif not is_literal and hello.server_name is None:
            reason = "the TLS handshake names no server (SNI)"
        elif not is_literal and hello.server_name != self._host:
            reason = "the TLS handshake names another server than the connection was made to"
        elif hello.alpn and not _HTTP_ALPN.intersection(hello.alpn):
            reason = "the client speaks no HTTP"
        if not reason:
            return None
        self._record("tls", "deny", rule="tls", reason=reason)
        return Refusal(403, "egress_denied", "tls", reason)

    # HTTP.

    async def _serve(
        self, scheme: Scheme, stream: ByteStream, host: str, denied: Refusal | None
    ) -> None:
        session = self._session(scheme, host)
        try:
            if isinstance(stream, TlsStream) and stream.protocol == H2:
                # Imported when first spoken: h2 doubles what importing this package costs.
                from taskvm.net.http2guest import Http2Guest
                from taskvm.wire.http2 import CONNECTION_WINDOW

                with self._egress.in_flight.window(CONNECTION_WINDOW) as window:
                    await Http2Guest(session, stream, denied, window).run()
            else:
                await Http1Guest(session, stream, denied).run()
            async with asyncio.timeout(LINGER_S):
                await stream.end()
        except (ssl.SSLError, TimeoutError):
            self._stream.abort()

    def _session(self, scheme: Scheme, host: str) -> Session:
        origin = Origin(scheme, host, self._destination.port)
        return Session(self._egress, origin, self._number, self._destination.exec)

    def _denial(self) -> Refusal | None:
        return None if self._decision.allowed else Refusal.of(self._decision)

    async def _close(self, stream: GuestStream) -> None:
        """Read on for a moment, so that our last bytes reach the guest; then end the stream."""
        left = LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while left > 0 and (data := await stream.read()):
                    left -= len(data)
        stream.abort()

    # The record.

    def _record_opening(self) -> bool:
        if self._decision.allowed:
            return True  # recorded when the server is dialled, with its address
        decision = self._decision
        return self._record("connect", "deny", rule=decision.rule, reason=decision.reason)

    def _record(self, kind: Kind, verdict: Verdict, *, reason: str, rule: str = "") -> bool:
        named = parse_address(self._host) is None
        return self._egress.audit.record(
            kind,
            verdict,
            rule=rule,
            reason=reason,
            connection=self._number,
            exec=self._destination.exec,
            host=self._host if named else "",
            address="" if named else self._host,
            port=self._destination.port,
        )


class _UnknownProtocolError(Exception):
    """Raised while sniffing, when the first bytes are nothing that the gateway speaks."""


class _SshError(_UnknownProtocolError):
    """Raised while sniffing, when the client speaks SSH: it can be told in words."""
