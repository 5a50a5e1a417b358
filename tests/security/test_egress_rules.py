"""Attacks on rules with methods and paths: judged from what reached the server, and from the record."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from tests.support.egress_lab import HttpServer, Lab, egress_lab, http_server, scripted_server

from taskvm.egress.policy import Policy
from taskvm.port import StreamReset

RULES = """
[[rules]]
name = "no admin"
action = "deny"
hosts = ["api.test"]
paths = ["/admin/**"]

[[rules]]
name = "read"
action = "allow"
hosts = ["api.test"]
methods = ["GET"]
paths = ["/public/**", "/admin/**"]
"""


@pytest.fixture
def canary() -> Iterator[HttpServer]:
    with http_server() as server:
        yield server


async def send(canary: HttpServer, *requests: bytes) -> list[tuple[int, str]]:
    """Send requests one after another, each on its own connection; return each status and rule."""
    answers = []
    async with egress_lab(
        rules=RULES, allow_addresses=[f"127.0.0.1:{canary.port}"], hosts={"api.test": ["127.0.0.1"]}
    ) as lab:
        for line in requests:
            sock = await lab.connect("api.test", canary.port)
            head = b"\r\nHost: api.test:%d\r\nConnection: close\r\n\r\n" % canary.port
            answer = await sock.exchange(line + head)
            judged = [event for event in lab.events if event.kind == "request"]
            answers.append((int(answer.split()[1]), judged[-1].rule))
    return answers


async def test_what_a_rule_allows_arrives(canary: HttpServer) -> None:
    lines = [
        b"GET /public/a?b=../c HTTP/1.1",
        b"HEAD /public HTTP/1.1",
        b"GET /p%75blic/%7eme HTTP/1.1",
    ]

    assert await send(canary, *lines) == [(200, "read")] * 3
    assert [seen.path for seen in canary.requests] == [
        "/public/a?b=../c",
        "/public",
        "/p%75blic/%7eme",
    ]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b"POST /public/a HTTP/1.1", "default"),
        (b"GET /other HTTP/1.1", "default"),
        (b"OPTIONS * HTTP/1.1", "ambiguous-path"),
        (b"GET /admin HTTP/1.1", "no admin"),
        (b"GET /Admin/x HTTP/1.1", "no admin"),
        (b"GET /%61dmin/ HTTP/1.1", "no admin"),
        (b"GET /public/../admin HTTP/1.1", "ambiguous-path"),
        (b"GET /public/%2e%2e/admin HTTP/1.1", "ambiguous-path"),
        (b"GET /public/..%2fadmin HTTP/1.1", "ambiguous-path"),
        (b"GET /public/%252e%252e/admin HTTP/1.1", "ambiguous-path"),
        (b"GET /public/..;/admin HTTP/1.1", "ambiguous-path"),
        (b"GET /public//admin HTTP/1.1", "ambiguous-path"),
        (b"GET /public/a HTTP/1.1\r\nX-HTTP-Method-Override: DELETE", "ambiguous-method"),
        (b"GET /public/a HTTP/1.1\r\nx-method-override: DELETE", "ambiguous-method"),
        (b"GET /public/a HTTP/1.1\r\nX_HTTP_Method_Override: DELETE", "ambiguous-method"),
        (b"GET /public/a HTTP/1.1\r\nX.HTTP.Method!Override: DELETE", "ambiguous-method"),
        (b"GET /public/a?a=b&%5fmethod=DELETE HTTP/1.1", "ambiguous-method"),
        (b"GET /public/a?.method=DELETE HTTP/1.1", "ambiguous-method"),
        (b"GET /public/a?%20+_method=DELETE HTTP/1.1", "ambiguous-method"),
        (b"GET /public/a?_method%00x=DELETE HTTP/1.1", "ambiguous-method"),
        (b"GET /public/a HTTP/1.1\r\nX-Original-URL: /admin", "ambiguous-path"),
        (b"GET /public/a HTTP/1.1\r\nx_rewrite_url: /admin", "ambiguous-path"),
    ],
)
async def test_no_spelling_goes_around_a_rule(canary: HttpServer, line: bytes, rule: str) -> None:
    ((status, decided),) = await send(canary, line)

    assert canary.connections == 0
    assert (status, decided) == (403, rule)


# Changing a policy while it is used.

EXCHANGE = b"GET / HTTP/1.1\r\nHost: %s:%d\r\n\r\n"
NAMES = {"api.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]}


async def test_a_narrower_policy_cuts_what_is_open_and_nothing_else(canary: HttpServer) -> None:
    address = f"127.0.0.1:{canary.port}"
    async with egress_lab(allow=list(NAMES), allow_addresses=[address], hosts=NAMES) as lab:
        idle = await lab.connect("api.test", canary.port)
        kept = await lab.connect("other.test", canary.port)
        for sock, name in ((idle, b"api.test"), (kept, b"other.test")):
            await sock.write(EXCHANGE % (name, canary.port))
            assert b"200" in await sock.read_response()

        lab.gateway.change_policy(lab.policy.denying("api.test"))

        with pytest.raises(StreamReset):
            await idle.read()
        await kept.write(EXCHANGE % (b"other.test", canary.port))
        assert b"200" in await kept.read_response()
        assert await lab.guest.resolve("api.test") == (3, None)
        assert [event.rule for event in lab.denials("connect")] == ["policy-changed"]
    assert len(canary.requests) == 3


async def test_a_narrower_policy_cuts_a_response_in_the_middle() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nthe first bytes"
    async with scripted_server(head, close=False) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_lab(allow=list(NAMES), allow_addresses=[address], hosts=NAMES) as lab:
            sock = await lab.connect("api.test", server.port)
            await sock.write(EXCHANGE % (b"api.test", server.port))
            received = b""
            while b"the first bytes" not in received:
                data = await sock.read()
                assert data, "the answer ended"
                received += data

            lab.gateway.change_policy(Policy())

            with pytest.raises(StreamReset):
                await sock.read_all()


async def test_a_wider_policy_holds_for_the_next_connection(canary: HttpServer) -> None:
    address = f"127.0.0.1:{canary.port}"
    async with egress_lab(allow_addresses=[address], hosts=NAMES) as lab:
        before = await lab.guest.resolve("api.test")
        lab.gateway.change_policy(lab.policy.allowing("api.test"))
        sock = await lab.connect("api.test", canary.port)
        await sock.write(EXCHANGE % (b"api.test", canary.port))

        assert before == (3, None)
        assert b"200" in await sock.read_response()


async def test_a_change_while_a_request_is_under_way_lets_nothing_denied_through(
    canary: HttpServer,
) -> None:
    """Whatever the moment of the change: after it, no request of the denied host arrives."""
    address = f"127.0.0.1:{canary.port}"
    async with egress_lab(allow=list(NAMES), allow_addresses=[address], hosts=NAMES) as lab:
        for turns in range(12):
            await _change_after(lab, canary, turns)


async def _change_after(lab: Lab, canary: HttpServer, turns: int) -> None:
    lab.gateway.change_policy(lab.policy)
    sock = await lab.connect("api.test", canary.port)
    await sock.write(EXCHANGE % (b"api.test", canary.port))
    for _ in range(turns):
        await asyncio.sleep(0)
    lab.gateway.change_policy(lab.policy.denying("api.test"))
    with contextlib.suppress(StreamReset):
        await sock.write(EXCHANGE.replace(b"/", b"/late", 1) % (b"api.test", canary.port))
        await sock.read_all()
    assert "/late" not in [seen.path for seen in canary.requests]


# Denials in other protocols.


@pytest.mark.parametrize(
    ("host", "said"),
    [("api.test", b"SSH is not carried"), ("other.test", b"no rule allows this host")],
)
async def test_ssh_is_refused_in_its_own_words(canary: HttpServer, host: str, said: bytes) -> None:
    address = f"127.0.0.1:{canary.port}"
    async with egress_lab(allow=["api.test"], allow_addresses=[address], hosts=NAMES) as lab:
        target = await lab.address_of("api.test")
        if host != "api.test":
            lab.gateway.change_policy(Policy())
        sock = await lab.guest.connect(target, canary.port)
        answer = await sock.exchange(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n")

        assert answer.startswith(b"SSH-2.0-taskvm\r\n")
        assert said in answer
        assert lab.denials("connect")[-1].rule == "protocol"
    assert canary.connections == 0
