"""Attacks on hosts whose TLS is not intercepted: reach another server, or carry a secret, through them.

Judged from the canary servers and the audit log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.support.egress_lab import (
    HttpServer,
    Lab,
    egress_lab,
    hello_with_ech,
    http_server,
    read_all,
)

from taskvm.egress.secret import Secret
from taskvm.errors import UsageError

RULES = """
[[rules]]
name = "read"
action = "allow"
hosts = ["half.test"]
methods = ["GET"]
"""


@asynccontextmanager
async def lab_for(
    server: HttpServer, *, rules: str = "", passes: str = "pinned.test"
) -> AsyncIterator[Lab]:
    async with egress_lab(
        allow=["pinned.test", "api.test"],
        allow_addresses=[f"127.0.0.1:{server.port}"],
        rules=rules,
        hosts={name: ["127.0.0.1"] for name in ("pinned.test", "api.test", "half.test")},
        passthrough=[passes],
    ) as lab:
        yield lab


@pytest.mark.parametrize("name", ["api.test", "evil.test", None])
async def test_another_server_name_does_not_pass(name: str | None) -> None:
    """Fronting: the address is the pinned host's, the name in TLS another's."""
    with http_server("pinned.test", "api.test", "evil.test") as canary:
        async with lab_for(canary) as lab:
            address = await lab.address_of("pinned.test")
            async with lab.tls(address, canary.port, name) as stream:
                await stream.write(b"GET / HTTP/1.1\r\nHost: pinned.test\r\n\r\n")
                answer = await read_all(stream)

            assert answer.startswith(b"HTTP/1.1 403")
            assert lab.denials("tls")[0].rule == "tls"
    assert canary.connections == 0


async def test_a_hidden_server_name_does_not_pass() -> None:
    """Where nothing is intercepted the outer name of ECH says nothing about the inner one."""
    with http_server("pinned.test") as canary:
        async with lab_for(canary) as lab:
            sock = await lab.connect("pinned.test", canary.port)
            await sock.write(hello_with_ech(b"pinned.test"))
            await sock.read()

            assert lab.denials("tls")[0].rule == "passthrough"
    assert canary.connections == 0


async def test_an_internal_address_is_not_passed_to() -> None:
    with http_server("pinned.test") as canary:
        async with egress_lab(
            allow=["pinned.test"], hosts={"pinned.test": ["127.0.0.1"]}, passthrough=["pinned.test"]
        ) as lab:
            address = await lab.address_of("pinned.test")
            async with lab.tls(address, canary.port, "pinned.test") as stream:
                await stream.write(b"GET / HTTP/1.1\r\nHost: pinned.test\r\n\r\n")
                answer = await read_all(stream)

            assert answer.startswith(b"HTTP/1.1 403")
            assert lab.denials("connect")[0].address == "127.0.0.1"
    assert canary.connections == 0


async def test_a_host_of_which_not_everything_is_allowed_does_not_pass() -> None:
    """Methods and paths cannot be judged in what is not read."""
    with http_server("half.test") as canary:
        async with lab_for(canary, rules=RULES, passes="half.test") as lab:
            address = await lab.address_of("half.test")
            async with lab.tls(address, canary.port, "half.test") as stream:
                await stream.write(b"DELETE / HTTP/1.1\r\nHost: half.test\r\n\r\n")
                answer = await read_all(stream)

            assert answer.startswith(b"HTTP/1.1 403")
            assert lab.denials("tls")[0].rule == "passthrough"
    assert canary.connections == 0


async def test_what_cannot_be_recorded_does_not_pass() -> None:
    with http_server("pinned.test") as canary:
        async with lab_for(canary) as lab:
            address = await lab.address_of("pinned.test")
            lab.audit.close()  # as when the disk is full
            async with lab.tls(address, canary.port, "pinned.test") as stream:
                await stream.write(b"GET / HTTP/1.1\r\nHost: pinned.test\r\n\r\n")
                answer = await read_all(stream)

        assert answer.startswith(b"HTTP/1.1 403")
    assert canary.requests == []


async def test_a_secret_for_such_a_host_starts_nothing() -> None:
    secret = Secret("KEY", "sk-live-0123456789abcdef", hosts=["pinned.test"])

    with pytest.raises(UsageError):
        async with egress_lab(allow=["pinned.test"], secrets=[secret], passthrough=["pinned.test"]):
            pass
