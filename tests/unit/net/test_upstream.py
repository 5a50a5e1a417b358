"""Dialling servers: only judged addresses, only trusted servers, and none of this host's own."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from pathlib import Path

import pytest
from tests.support.egress_lab import SERVER_CA, RecordingResolver, http_server
from tests.support.waiting import until

from taskvm.egress.policy import Policy
from taskvm.errors import UpstreamError, UsageError
from taskvm.net import upstream
from taskvm.net.streams import SocketStream
from taskvm.net.upstream import AddressRefused, Dialer, client_context, is_own_address
from taskvm.wire.message import Origin


def test_this_hosts_addresses_are_its_own() -> None:
    assert is_own_address(ipaddress.ip_address("127.0.0.1"))
    assert not is_own_address(ipaddress.ip_address("192.0.2.1"))


async def test_a_public_address_of_this_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host in a data centre has a public address, and services that trust their neighbours."""
    monkeypatch.setattr(upstream, "is_own_address", lambda address: True)
    dialer = Dialer(Policy.parse(["me.test"]), RecordingResolver({"me.test": ["8.8.8.8"]}))

    with pytest.raises(AddressRefused) as caught:
        await dialer.connect(Origin("http", "me.test", 80))

    assert caught.value.decision.rule == "special-address"


async def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    with http_server() as server:
        rules = [f"127.0.0.1:{server.port}", f"127.0.0.2:{server.port}"]
        resolver = RecordingResolver({"api.test": ["127.0.0.2", "127.0.0.1"]})
        dialer = Dialer(Policy.parse(["api.test"], rules), resolver)

        connection = await dialer.connect(Origin("http", "api.test", server.port))

        assert connection.address == "127.0.0.1"
        assert connection.rule == rules[0]
        assert connection.is_quiet()
        connection.abort()


async def test_the_connections_to_servers_are_bounded_and_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Descriptors are the process's: a guest with many connections must leave other sandboxes theirs."""
    monkeypatch.setattr(upstream, "MAX_SERVERS", 3)
    with http_server() as server:
        resolver = RecordingResolver({"api.test": ["127.0.0.1"]})
        dialer = Dialer(Policy.parse(["api.test"], [f"127.0.0.1:{server.port}"]), resolver)
        origin = Origin("http", "api.test", server.port)

        opened = [await dialer.connect(origin) for _ in range(3)]
        with pytest.raises(UpstreamError, match="Too many open files"):
            await dialer.connect(origin)
        opened.pop().abort()
        opened.append(await dialer.connect(origin))

        for each in opened:
            each.abort()


async def test_a_host_that_is_short_of_descriptors_keeps_them_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upstream, "keep_room", lambda descriptor: False)
    with http_server() as server:
        resolver = RecordingResolver({"api.test": ["127.0.0.1"]})
        dialer = Dialer(Policy.parse(["api.test"], [f"127.0.0.1:{server.port}"]), resolver)

        with pytest.raises(UpstreamError, match="Too many open files"):
            await dialer.connect(Origin("http", "api.test", server.port))

    assert server.connections == 0


async def test_a_server_that_is_not_trusted_is_an_upstream_error(tmp_path: Path) -> None:
    with http_server("api.test") as server:
        policy = Policy.parse(["api.test"], [f"127.0.0.1:{server.port}"])
        dialer = Dialer(policy, RecordingResolver({"api.test": ["127.0.0.1"]}))

        with pytest.raises(UpstreamError, match="certificate is not trusted"):
            await dialer.connect(Origin("https", "api.test", server.port))


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_a_ca_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UsageError, match=r"ca\.pem"):
        Dialer(Policy(), RecordingResolver({}), [path])


def test_servers_are_verified_with_the_hosts_trust_and_more(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    SERVER_CA.cert_pem.write_to_path(path)

    context = client_context([path])

    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    ours = SERVER_CA.cert_pem.bytes().decode().strip()
    assert ours in [ssl.DER_cert_to_PEM_cert(der).strip() for der in context.get_ca_certs(True)]


async def test_a_closed_or_talking_connection_is_not_quiet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stream = SocketStream(socket.create_connection(listener.getsockname()))
        theirs, _ = listener.accept()

    assert stream.is_quiet()
    theirs.send(b"x")
    await stream.read()
    assert stream.is_quiet()
    theirs.send(b"y")
    await until(lambda: not stream.is_quiet())
    await stream.read()
    theirs.close()
    await until(lambda: not stream.is_quiet())
    stream.abort()
    assert not stream.is_quiet()
