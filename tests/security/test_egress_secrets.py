"""Attacks on secrets: the guest tries to get a value, or to make one travel where it should not.

Judged from what reached the servers and from the record; the value is searched for in everything the guest can see.
"""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from tests.support.egress_lab import (
    HttpServer,
    Lab,
    chunks_of,
    egress_lab,
    http_server,
    read_all,
)

from taskvm.egress.boundsecret import bind_secrets
from taskvm.egress.injection import InjectionRefused, Injector
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret

VALUE = "sk-live-0123456789abcdef"


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with http_server("api.test", "other.test") as server:
        yield server


@asynccontextmanager
async def lab_for(
    server: HttpServer, *, hosts: tuple[str, ...] = ("api.test",), headers: tuple[str, ...] = ()
) -> AsyncIterator[Lab]:
    chosen = {"headers": headers} if headers else {}
    async with egress_lab(
        allow=["api.test", "other.test"],
        allow_addresses=[f"127.0.0.1:{server.port}"],
        hosts={"api.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]},
        secrets=[Secret("API_KEY", VALUE, hosts=hosts, **chosen)],
    ) as lab:
        yield lab
        # What the guest and the log can never show, whatever a test did.
        assert VALUE.encode() not in b"".join(lab.lines)


async def send(
    lab: Lab, server: HttpServer, *headers: str, host: str = "api.test", line: str = "GET / HTTP/1.1",
    body: bytes = b"",
) -> bytes:  # fmt: skip
    """Send one HTTPS request as a program does; {p} in it is the placeholder."""
    address = await lab.address_of(host)
    lines = [line, f"Host: {host}:{server.port}", "Connection: close", *headers, "", ""]
    text = "\r\n".join(lines).replace("{p}", lab.secrets[0].placeholder)
    async with lab.tls(address, server.port, host) as stream:
        await stream.write(text.encode() + body)
        return await read_all(stream)


async def test_the_value_reaches_its_host_in_its_header_and_the_guest_sees_none_of_it(
    server: HttpServer,
) -> None:
    async with lab_for(server) as lab:
        answer = await send(lab, server, "Authorization: Bearer {p}", "X-Other: 1")

        assert server.requests[0].header("Authorization") == f"Bearer {VALUE}"
        assert VALUE.encode() not in answer
        used = [e for e in lab.events if e.kind == "secret"]
        assert [(e.decision, e.secrets, e.host) for e in used] == [
            ("allow", ("API_KEY",), "api.test")
        ]


async def test_basic_credentials_are_opened_and_closed_again(server: HttpServer) -> None:
    async with lab_for(server) as lab:
        credentials = base64.b64encode(f"user:{lab.secrets[0].placeholder}".encode()).decode()
        await send(lab, server, f"Authorization: basic {credentials}")

    sent = server.requests[0].header("Authorization") or ""
    assert base64.b64decode(sent.removeprefix("basic ")) == f"user:{VALUE}".encode()


@pytest.mark.parametrize(
    ("line", "headers", "host"),
    [
        ("GET / HTTP/1.1", ["Authorization: Bearer {p}"], "other.test"),
        ("GET / HTTP/1.1", ["X-Anything: {p}"], "api.test"),
        ("GET / HTTP/1.1", ["Cookie: a={p}"], "api.test"),
        ("GET / HTTP/1.1", ["User-Agent: {p}"], "api.test"),
        ("GET / HTTP/1.1", ["{p}: x"], "api.test"),
        ("GET /{p} HTTP/1.1", [], "api.test"),
        ("GET /?key={p} HTTP/1.1", [], "api.test"),
        ("GET /?key=%74{p} HTTP/1.1", [], "api.test"),
        ("GET / HTTP/1.1", ["Authorization: {p}", "X-Second: {p}"], "api.test"),
        ("{p} / HTTP/1.1", [], "api.test"),
    ],
)
async def test_a_placeholder_anywhere_else_stops_the_request(
    server: HttpServer, line: str, headers: list[str], host: str
) -> None:
    async with lab_for(server) as lab:
        answer = await send(lab, server, *headers, line=line, host=host)

        assert int(answer.split()[1]) in (400, 403)
        assert VALUE.encode() not in answer
        assert lab.denials("request")
    assert server.connections == 0


@pytest.mark.parametrize(
    ("line", "headers"),
    [
        ("GET / HTTP/1.1", [f"Authorization: Bearer {VALUE}"]),
        ("GET / HTTP/1.1", [f"X-Log: before-{VALUE}-after"]),
        ("GET / HTTP/1.1", ["Authorization: Basic " + base64.b64encode(VALUE.encode()).decode()]),
        ("GET / HTTP/1.1", ["X-Any: Basic " + base64.b64encode(VALUE.encode()).decode().strip("=")]),
        (f"GET /{VALUE} HTTP/1.1", []),
        (f"GET /?q={VALUE.replace('-', '%2D')} HTTP/1.1", []),
    ],
)  # fmt: skip
async def test_a_value_that_comes_from_the_guest_stops_the_request(
    server: HttpServer, line: str, headers: list[str]
) -> None:
    async with lab_for(server) as lab:
        answer = await send(lab, server, *headers, line=line)

        assert b" 403 " in answer
        assert VALUE.encode() not in answer
        assert [e.secrets for e in lab.denials("secret")] == [("API_KEY",)]
        assert VALUE.replace("-", "%2D").encode() not in b"".join(lab.lines)
    assert server.connections == 0


async def test_a_body_is_sent_as_it_is(server: HttpServer) -> None:
    async with lab_for(server) as lab:
        body = lab.secrets[0].placeholder.encode()
        line = "POST / HTTP/1.1"
        answer = await send(lab, server, f"Content-Length: {len(body)}", line=line, body=body)

    assert server.requests[0].body == body
    assert b"".join(chunks_of(answer)) == body  # what could be the beginning of a value comes later


async def test_a_placeholder_in_a_trailer_breaks_the_request_off(server: HttpServer) -> None:
    async with lab_for(server) as lab:
        body = b"3\r\nabc\r\n0\r\nX-Last: " + lab.secrets[0].placeholder.encode() + b"\r\n\r\n"
        answer = await send(
            lab, server, "Transfer-Encoding: chunked", line="POST / HTTP/1.1", body=body
        )

        assert answer.startswith(b"HTTP/1.1 403")
        assert lab.denials("secret")
    assert server.requests == []


async def test_a_secret_is_not_sent_in_clear_unless_its_host_names_the_port() -> None:
    with http_server() as clear:
        for hosts, status in ((("api.test",), 403), ((f"api.test:{clear.port}",), 200)):
            async with lab_for(clear, hosts=hosts) as lab:
                sock = await lab.connect("api.test", clear.port)
                placeholder = lab.secrets[0].placeholder
                await sock.write(
                    f"GET / HTTP/1.1\r\nHost: api.test:{clear.port}\r\nConnection: close\r\n"
                    f"Authorization: {placeholder}\r\n\r\n".encode()
                )
                answer = await sock.read_all()

                assert int(answer.split()[1]) == status
        assert [seen.header("Authorization") for seen in clear.requests] == [VALUE]


def test_naming_the_port_of_tls_does_not_allow_clear_text() -> None:
    """Who writes 443 means TLS: a guest that speaks HTTP to it must not show the value to all on the way."""
    policy = Policy.parse(["api.test"])
    (bound,) = bind_secrets(policy, [Secret("KEY", VALUE, hosts=["api.test:443"])], os.urandom)
    headers = [(b"Authorization", bound.placeholder.encode())]
    injector = Injector([bound])

    with pytest.raises(InjectionRefused, match="in clear"):
        injector.inject("http", "api.test", 443, b"/", headers)
    assert injector.inject("https", "api.test", 443, b"/", headers).used == ("KEY",)


async def test_a_value_that_looks_like_a_placeholder_is_not_replaced_again(
    server: HttpServer,
) -> None:
    async with lab_for(server) as lab:
        twice = "Authorization: {p}{p}"
        await send(lab, server, twice)

    assert server.requests[0].header("Authorization") == VALUE * 2


async def test_placeholders_differ_between_sandboxes(server: HttpServer) -> None:
    async with lab_for(server) as first, lab_for(server) as second:
        stolen = first.secrets[0].placeholder
        await send(second, server, f"Authorization: {stolen}")

    assert server.requests[0].header("Authorization") == stolen
