"""Connecting to servers: look up, judge every address, dial exactly a judged one, verify TLS.

Rule 1: there is one lookup for one connection, and no name is given to `connect`: nothing can
        change in between.
Rule 2: an address of this host is internal, even a public one: what listens here is not for guests.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import ssl
from collections.abc import Iterable
from contextlib import closing

from taskvm.egress.nametable import MAX_ADDRESSES
from taskvm.egress.policy import Decision, Policy, decide_address
from taskvm.errors import UpstreamError, UsageError
from taskvm.net.resolver import Resolver
from taskvm.net.streams import ByteStream, SocketStream
from taskvm.net.tlsstream import TlsStream
from taskvm.room import keep_room
from taskvm.wire.hostname import IPAddress, parse_address
from taskvm.wire.message import Origin

CONNECT_TIMEOUT_S = 10.0  # for one address
HANDSHAKE_TIMEOUT_S = 15.0
# Connections to servers of one sandbox: one for each of the guest's, and as many for those of HTTP/2 whose
# servers speak HTTP/1.1. Descriptors are the process's, and other sandboxes need theirs.
MAX_SERVERS = 512

# What ALPN calls the versions of HTTP (RFC 7301, RFC 9113 section 3.1).
H1 = "http/1.1"
H2 = "h2"


class AddressRefused(Exception):  # noqa: N818 - a decision, not a fault
    """Raised when no address of an allowed name may be connected to.

    `address` is for the audit log only.
    """

    def __init__(self, decision: Decision, address: IPAddress) -> None:
        super().__init__(decision.reason)
        self.decision = decision
        self.address = address


class Upstream:
    """An open connection to a server."""

    def __init__(
        self, stream: ByteStream, wire: SocketStream, address: str, rule: str, protocol: str = H1
    ) -> None:
        self.stream = stream
        self.address = address
        self.rule = rule
        self.protocol = protocol
        self._wire = wire

    def is_quiet(self) -> bool:
        """Say whether the idle connection can take another request."""
        return self._wire.is_quiet()

    def abort(self) -> None:
        """Close it at once."""
        self._wire.abort()


class Dialer:
    """Opens connections to servers for one sandbox. `policy` judges addresses; it may be replaced."""

    def __init__(
        self,
        policy: Policy,
        resolver: Resolver,
        extra_ca_files: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        """Raises UsageError for a CA file that cannot be read."""
        self.policy = policy
        self._resolver = resolver
        self._ca_files = tuple(extra_ca_files)
        _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), self._ca_files)
        self._tls: dict[tuple[str, ...], ssl.SSLContext] = {}
        self._sockets: list[socket.socket] = []  # some of them closed by now

    async def connect(self, origin: Origin, protocols: tuple[str, ...] = (H1,)) -> Upstream:
        """Open a connection to `origin`, which the policy has allowed.

        The server chooses among `protocols` by ALPN. Raises AddressRefused, UpstreamError.
        """
        sock, address, rule = await self.reach(origin)
        return await self._secure(origin, sock, address, rule, protocols)

    async def reach(self, origin: Origin) -> tuple[socket.socket, str, str]:
        """Return a connected socket, its address, and the rule that let it be dialled.

        Raises AddressRefused, UpstreamError.
        """
        literal = parse_address(origin.host)
        found = [literal] if literal is not None else await self._resolver.resolve(origin.host)
        allowed, refusal = self._judge(origin, found[:MAX_ADDRESSES])
        if not allowed:
            assert refusal is not None, "a resolver returns at least one address"
            raise refusal
        failure = ""
        for address, rule in allowed:
            try:
                sock = await self._dial(address, origin.port)
            except OSError as error:
                # asyncio puts the address into the text: the guest must not learn it.
                failure = os.strerror(error.errno) if error.errno else "no answer in time"
                continue
            return sock, str(address), rule
        raise UpstreamError(f"connect to {origin.authority}", failure)

    async def _dial(self, address: IPAddress, port: int) -> socket.socket:
        sock = self._open_socket(address)
        try:
            if not keep_room(sock.fileno()):
                raise OSError(errno.EMFILE, "")
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
        except BaseException:
            sock.close()
            raise
        return sock

    def _open_socket(self, address: IPAddress) -> socket.socket:
        if len(self._sockets) >= MAX_SERVERS:
            self._sockets = [sock for sock in self._sockets if sock.fileno() >= 0]
        if len(self._sockets) >= MAX_SERVERS:
            raise OSError(errno.EMFILE, "")
        family = socket.AF_INET if isinstance(address, ipaddress.IPv4Address) else socket.AF_INET6
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._sockets.append(sock := socket.socket(family, kind))
        return sock

    def _judge(
        self, origin: Origin, found: Iterable[IPAddress]
    ) -> tuple[list[tuple[IPAddress, str]], AddressRefused | None]:
        allowed: list[tuple[IPAddress, str]] = []
        refusal: AddressRefused | None = None
        for address in found:
            decision = decide_address(self.policy, origin.host, address, origin.port)
            if decision.allowed and decision.rule == "public" and is_own_address(address):
                decision = Decision(
                    False, "special-address", "the host's address is the sandbox host's own",
                    "Ask the owner of this sandbox for an address rule",
                )  # fmt: skip
            if decision.allowed:
                allowed.append((address, decision.rule))
            else:
                refusal = refusal or AddressRefused(decision, address)
        return allowed, refusal

    async def _secure(
        self, origin: Origin, sock: socket.socket, address: str, rule: str,
        protocols: tuple[str, ...],
    ) -> Upstream:  # fmt: skip
        wire = SocketStream(sock)
        if origin.scheme == "http":
            return Upstream(wire, wire, address, rule)
        try:
            context = await self._context(protocols)
            stream = TlsStream(wire, context, server_hostname=origin.host)
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await stream.handshake()
        except BaseException as error:
            wire.abort()
            if isinstance(error, OSError):  # ssl.SSLError and TimeoutError are
                raise UpstreamError(f"connect to {origin.authority}", _say(error)) from error
            raise
        return Upstream(stream, wire, address, rule, stream.protocol or H1)

    async def _context(self, protocols: tuple[str, ...]) -> ssl.SSLContext:
        # Reading the host's trust store costs 20 ms: not at every sandbox's start, not on the loop.
        if protocols not in self._tls:
            self._tls[protocols] = await asyncio.to_thread(
                client_context, self._ca_files, protocols
            )
        return self._tls[protocols]


def client_context(
    extra_ca_files: Iterable[str | os.PathLike[str]] = (), protocols: Iterable[str] = (H1,)
) -> ssl.SSLContext:
    """Return the context that servers are verified with: the host's trust store, and these files.

    Raises UsageError for a file that cannot be read.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(protocols)
    _load(context, extra_ca_files)
    return context


def is_own_address(address: IPAddress) -> bool:
    """Say whether packets to `address` would come back to this host.

    Sends none: a UDP connect only routes.
    """
    family = socket.AF_INET if isinstance(address, ipaddress.IPv4Address) else socket.AF_INET6
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((str(address), 9))
        except OSError:
            return False  # no route: connecting will fail and say so
        return bool(probe.getsockname()[0] == str(address))


def _load(context: ssl.SSLContext, ca_files: Iterable[str | os.PathLike[str]]) -> None:
    for path in ca_files:
        try:
            context.load_verify_locations(cafile=os.fspath(path))
        except OSError as error:
            is_tls = isinstance(error, ssl.SSLError)  # its errno is OpenSSL's own
            raise UsageError(
                f"read the CA file {os.fspath(path)}",
                "it holds no certificate" if is_tls else os.strerror(error.errno or 0),
                "Give a file with certificates in PEM form",
            ) from error


def _say(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message})"
    if isinstance(error, TimeoutError):
        return "the TLS handshake did not end in time"
    return f"TLS failed ({error.strerror or 'connection closed'})"
