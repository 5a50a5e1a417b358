"""A lying agent says which exec a connection came from: it may name another one, and nothing is decided by it."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.egress_lab import egress_lab, http_server
from tests.support.waiting import PATIENCE_S

from taskvm import GuestProtocolError, SandboxLostError

RUNNING = (5, 6)


async def outcome(address: str | None = None, **claims: object) -> tuple[bytes, set[int]]:
    """Ask for a page with these claims. Return the status line, and the execs of the connection's audit lines."""
    with http_server() as server:
        async with egress_lab(
            allow=["api.test"],
            allow_addresses=[f"127.0.0.1:{server.port}"],
            hosts={"api.test": ["127.0.0.1"]},
            running_execs=RUNNING,
        ) as lab:
            to = address or await lab.address_of("api.test")
            sock = await lab.guest.connect(to, server.port, **claims)
            head = f"GET / HTTP/1.1\r\nHost: api.test:{server.port}\r\nConnection: close\r\n\r\n"
            answer = await sock.exchange(head.encode())
    return answer[:12], {event.exec for event in lab.events if event.connection}


@pytest.mark.parametrize("number", RUNNING)
async def test_a_number_of_a_running_exec_is_recorded(number: int) -> None:
    assert await outcome(exec=number) == (b"HTTP/1.1 200", {number})


async def test_no_number_is_recorded_as_none() -> None:
    assert await outcome() == (b"HTTP/1.1 200", {0})


@pytest.mark.parametrize("number", [0, -1, 7, 0x80000005, 2**31, 2**63, 2**64 - 1, -(2**63)])
async def test_a_number_of_no_running_exec_is_recorded_as_none(number: int) -> None:
    """Neither the request nor the sandbox suffers, and the record holds no number that the guest made up."""
    assert await outcome(exec=number) == (b"HTTP/1.1 200", {0})


async def test_no_number_opens_what_is_denied() -> None:
    assert await outcome("127.0.0.1", exec=5) == (b"HTTP/1.1 403", {5})


@pytest.mark.parametrize("claim", ["5", b"5", 5.5, True, None, [5], {"exec": 5}])
async def test_what_is_no_number_breaks_the_ports_rules(claim: object) -> None:
    """As every malformed OPEN: that sandbox is over."""
    async with egress_lab(running_execs=RUNNING) as lab, asyncio.timeout(PATIENCE_S):
        with pytest.raises(SandboxLostError):
            await lab.guest.connect("198.18.0.1", 80, exec=claim)
        while lab.failure is None:
            await asyncio.sleep(0.01)

    assert isinstance(lab.failure, GuestProtocolError)
    assert lab.lines == []
