"""TLS that passes unread: taskvm.net.splice, and what the guest trusts then (taskvm.net.truststore)."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.egress_lab import SERVER_CA, HttpServer, Lab, egress_lab, http_server
from tests.support.waiting import PATIENCE_S

from taskvm.net import splice
from taskvm.net.tlsstream import TlsStream
from taskvm.net.truststore import host_authorities, make_bundle


@asynccontextmanager
async def sandbox(server: HttpServer, **options: object) -> AsyncIterator[Lab]:
    async with egress_lab(
        allow=["pinned.test", "api.test"],
        allow_addresses=[f"127.0.0.1:{server.port}"],
        hosts={"pinned.test": ["127.0.0.1"], "api.test": ["127.0.0.1"]},
        passthrough=["pinned.test"],
        **options,
    ) as lab:
        yield lab


def pinning_client() -> ssl.SSLContext:
    """A program that trusts its server's authority and nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    SERVER_CA.configure_trust(context)
    return context


async def ask(lab: Lab, port: int, name: str, context: ssl.SSLContext) -> bytes:
    sock = await lab.connect(name, port)
    stream = TlsStream(sock.stream(), context, server_hostname=name)
    await stream.handshake()
    head = f"GET /secret-path HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n"
    await stream.write(head.encode())
    answer = b""
    with contextlib.suppress(ssl.SSLEOFError):  # http.server says no goodbye in TLS
        while data := await stream.read():
            answer += data
    sock.reset()
    return answer


async def test_a_pinning_client_reaches_its_own_server_and_nothing_of_it_is_seen() -> None:
    with http_server("pinned.test") as server:
        async with sandbox(server) as lab:
            answer = await ask(lab, server.port, "pinned.test", pinning_client())
            async with asyncio.timeout(PATIENCE_S):
                while lab.gateway.connections:
                    await asyncio.sleep(0.01)

            passages = [e for e in lab.events if e.rule == "passthrough"]
            assert [e.decision for e in passages][:1] == ["allow"]
            assert passages[1].bytes_down > len(answer)
            assert b"secret-path" not in b"".join(lab.lines)
    assert answer.endswith(b"hello from the server")


async def test_every_other_host_is_intercepted_as_ever() -> None:
    with http_server("api.test") as server:
        async with sandbox(server) as lab:
            with pytest.raises(ssl.SSLCertVerificationError):
                await ask(lab, server.port, "api.test", pinning_client())
            answer = await ask(lab, server.port, "api.test", lab.client_tls())

    assert answer.endswith(b"hello from the server")


async def test_what_is_not_tls_to_such_a_host_is_judged_as_ever() -> None:
    with http_server() as server:
        async with sandbox(server) as lab:
            sock = await lab.connect("pinned.test", server.port)
            answer = await sock.exchange(b"GET / HTTP/1.1\r\nHost: api.test\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 403")
    assert server.requests == []


async def test_a_passage_on_which_nothing_moves_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with http_server("pinned.test") as server:
        async with sandbox(server) as lab:
            sock = await lab.connect("pinned.test", server.port)
            stream = TlsStream(sock.stream(), pinning_client(), server_hostname="pinned.test")
            await stream.handshake()
            monkeypatch.setattr(splice, "IDLE_TIMEOUT_S", 0.2)
            await stream.write(b"G")  # what moves last
            with pytest.raises(OSError, match="reset"):
                await stream.read()


def test_a_bundle_has_the_gateways_authority_the_hosts_and_the_extra_ones(tmp_path: Path) -> None:
    own, extra = SERVER_CA.cert_pem.bytes(), tmp_path / "extra.pem"
    extra.write_bytes(own.rstrip(b"\n"))

    bundle = make_bundle(own, [extra])

    assert bundle.startswith(own)
    assert bundle.endswith(own)
    assert bundle.count(b"BEGIN CERTIFICATE") == host_authorities().count(b"BEGIN CERTIFICATE") + 2
    ssl.create_default_context(cadata=bundle.decode())
