"""Guests and servers that do anything in any order: nothing is an error of ours, and nothing is left behind.

Judged from the audit log, and from what the gateway still holds when the guest is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

import h2.exceptions
import h2.settings
import pytest
from tests.support.egress_lab import Lab, egress_lab
from tests.support.h2_lab import Call, H2Client, fields, h2_client, h2_server
from tests.support.waiting import until

from taskvm.egress.secret import Secret
from taskvm.net.inflight import InFlight

CODES = h2.settings.SettingCodes


def disorderly_server(chance: random.Random) -> Callable[[Call, bool], None]:
    """Return a handler that answers well, badly, half, or by closing; soon, and not at once."""

    def settings(call: Call) -> None:
        code = chance.choice([CODES.MAX_CONCURRENT_STREAMS, CODES.INITIAL_WINDOW_SIZE])
        call.connection.update_settings({code: chance.randrange(6)})
        call.flush()

    def go_away(call: Call) -> None:
        call.raw(b"\0\0\x08\x07\0\0\0\0\0" + call.number.to_bytes(4, "big") + bytes(4))

    acts: list[Callable[[Call], object]] = [
        lambda call: call.head(200, end=True),
        lambda call: (call.head(200), call.data(b"y" * 1000, end=True)),
        lambda call: (call.head(200), call.data(b"x" * chance.randrange(1, 9000))),
        lambda call: (call.head(200), call.trailers(x="1")),
        lambda call: call.head(103),
        lambda call: call.reset(chance.randrange(14)),
        lambda call: call._server.transport.abort(),
        settings,
        go_away,
    ]

    def act(call: Call) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError, KeyError):  # its stream is over
            chance.choice(acts)(call)

    def handle(call: Call, ended: bool) -> None:
        asyncio.get_running_loop().call_later(chance.random() / 100, act, call)

    return handle


async def disorderly_client(lab: Lab, port: int, chance: random.Random) -> None:
    """Open requests, finish some, reset some, read a little, and be gone."""
    async with h2_client(lab, "api.test", port) as client:
        with contextlib.suppress(OSError, TimeoutError, h2.exceptions.ProtocolError):
            for _ in range(chance.randrange(1, 40)):
                _request(client, port, chance)
                if chance.random() < 0.3:
                    await client.flush()
                if chance.random() < 0.2:
                    async with asyncio.timeout(0.02):
                        await client.receive()
            await client.flush()
        client.stream.abort()


def _request(client: H2Client, port: int, chance: random.Random) -> None:
    number = client.open(fields(f"api.test:{port}", method=chance.choice(["GET", "POST"])))
    kind = chance.randrange(5)
    if kind == 0:
        client.connection.reset_stream(number, 8)
    elif kind == 1:
        client.connection.end_stream(number)
    elif kind == 2:
        client.connection.send_data(number, b"z" * 2000, end_stream=chance.random() < 0.5)
    elif kind == 3:
        client.connection.send_headers(number, [("x-t", "1")], end_stream=True)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_both_sides_do_nothing_is_left(seed: int) -> None:
    chance = random.Random(seed)  # the order of events is the machine's: no run is like another
    async with h2_server(disorderly_server(chance)) as server, egress_lab(
        allow=["api.test"], allow_addresses=[f"127.0.0.1:{server.port}"],
        hosts={"api.test": ["127.0.0.1"]}, secrets=[Secret("K", "a-value-1", hosts=["api.test"])],
    ) as lab:  # fmt: skip
        for _ in range(5):
            guests = [disorderly_client(lab, server.port, chance) for _ in range(6)]
            await asyncio.gather(*guests)
        await until(lambda: not lab.gateway.connections)

        egress = lab.gateway._egress
        assert vars(egress.in_flight) == vars(InFlight())
        assert [s for s in egress.dialer._sockets if s.fileno() >= 0] == []
        assert [event for event in lab.events if event.reason == "internal error"] == []
        assert lab.failure is None
