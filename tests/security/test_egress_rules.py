"""Attacks on rules with methods and paths: judged from what reached the server, and from the record."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.egress_lab import HttpServer, egress_lab, http_server

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
    ],
)
async def test_no_spelling_goes_around_a_rule(canary: HttpServer, line: bytes, rule: str) -> None:
    ((status, decided),) = await send(canary, line)

    assert canary.connections == 0
    assert (status, decided) == (403, rule)
