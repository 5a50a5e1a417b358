"""Attacks by HTTP/2: smuggling through the change of versions, another authority, floods, secrets in odd places.

Judged from what reached the canary servers and from the audit log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from h2.errors import ErrorCodes
from tests.support.egress_lab import HttpServer, Lab, egress_lab, http_server
from tests.support.h2_lab import (
    Answer,
    Call,
    Fields,
    H2Client,
    H2Server,
    fields,
    h2_client,
    h2_server,
)
from tests.support.waiting import PATIENCE_S, until

from taskvm.egress.secret import Secret
from taskvm.net import inflight
from taskvm.wire.message import MAX_FIELDS, Asked, HttpRefused

VALUE = "sk-live-0123456789abcdef"
FRANK = {"validate_outbound_headers": False, "normalize_outbound_headers": False}


@pytest.fixture
def canary() -> Iterator[HttpServer]:
    """A server of HTTP/1.1, where a request that was two would show."""
    with http_server("api.test", "other.test") as server:
        yield server


@asynccontextmanager
async def lab_for(server: HttpServer | H2Server, *secrets: Secret) -> AsyncIterator[Lab]:
    async with egress_lab(
        allow=["api.test", "other.test"],
        allow_addresses=[f"127.0.0.1:{server.port}"],
        hosts={"api.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]},
        secrets=secrets,
    ) as lab:
        yield lab


# Requests that are answered on their stream; the connection and its other streams go on.


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"authority": "other.test"}, 403),
        ({"authority": "evil.test"}, 403),
        ({"authority": "api.test:1"}, 403),
        ({"authority": "api.test:{port}@evil.test"}, 400),
        ({"authority": "api.test%00.evil.test"}, 400),
        ({"path": "http://evil.test/"}, 400),
        ({"path": "/a HTTP/1.1\r\nHost: evil.test\r\n\r\nGET /b"}, 400),
        ({"path": "/a b"}, 400),
        ({"path": "a"}, 400),
        ({"path": "/#x"}, 400),
        ({"method": "TRACE"}, 501),
        ({"method": "Trace"}, 501),
        ({"method": "connect"}, 403),
        ({"method": "GET / HTTP/1.1"}, 400),
    ],
)
async def test_a_request_that_means_another_is_refused_on_its_stream(
    canary: HttpServer, changed: dict[str, str], status: int
) -> None:
    async with lab_for(canary) as lab:
        async with h2_client(lab, "api.test", canary.port, **FRANK) as client:
            given = {"authority": "api.test:{port}", **changed}
            given["authority"] = given["authority"].format(port=canary.port)
            if "\r" in given.get("path", ""):  # h2 itself ends the connection
                await client.send(fields(**given))
                await client.read_to_end()
            else:
                assert (await client.ask(fields(**given))).status == status
                after = await client.ask(fields(f"api.test:{canary.port}", "/after"))
                assert after.status == 200

        assert lab.denials("request")
    assert {seen.path for seen in canary.requests} <= {"/after"}


async def test_every_stream_is_judged_by_itself(canary: HttpServer) -> None:
    async with lab_for(canary) as lab, h2_client(lab, "api.test", canary.port, **FRANK) as client:
        names = [f"api.test:{canary.port}", "evil.test", f"other.test:{canary.port}"]
        numbers = [await client.send(fields(name)) for name in names]
        answers = await client.finish(*numbers)

    assert [answer.status for answer in answers] == [200, 403, 403]
    assert len(canary.requests) == 1


# Requests that are none: the connection ends, and nothing has left.


@pytest.mark.parametrize(
    "extra",
    [
        [("transfer-encoding", "chunked")],
        [("connection", "keep-alive")],
        [("upgrade", "h2c")],
        [("x", "a\r\nGET /smuggled HTTP/1.1\r\nHost: api.test\r\n\r\n")],
        [("x\r\nhost: evil.test\r\ny", "1")],
        [("x: a", "1")],
        [("Host", "evil.test")],
        [("host", "evil.test")],
        [("host", "api.test"), ("host", "evil.test")],
        [("x", "1"), (":path", "/smuggled")],
        [(":authority", "evil.test")],
        [(":protocol", "websocket")],
        [("x", "a\0b")],
        [("", "x")],
    ],
)
async def test_a_head_that_smuggles_ends_the_connection(canary: HttpServer, extra: Fields) -> None:
    async with lab_for(canary) as lab:
        async with h2_client(lab, "api.test", canary.port, **FRANK) as client:
            await client.send([*fields(f"api.test:{canary.port}"), *extra])
            await client.read_to_end()

        assert client.goaway
        assert lab.denials("request")[0].rule == "http"
    assert canary.requests == []


@pytest.mark.parametrize(("length", "body"), [("3", b"123456"), ("10", b"123")])
async def test_a_body_of_another_length_does_not_become_a_second_request(
    canary: HttpServer, length: str, body: bytes
) -> None:
    """A server that trusted the length would read the rest as the next request."""
    async with lab_for(canary) as lab:
        async with h2_client(lab, "api.test", canary.port, **FRANK) as client:
            head = fields(f"api.test:{canary.port}", "/", "POST", content_length=length)
            await client.send(head, body)
            await client.read_to_end()

        assert lab.denials("request")
    assert canary.requests == []


async def test_a_trailer_cannot_bring_a_secret_or_what_frames(canary: HttpServer) -> None:
    secret = Secret("KEY", VALUE, hosts=["api.test"])
    async with lab_for(canary, secret) as lab:
        async with h2_client(lab, "api.test", canary.port, **FRANK) as client:
            await client.ask(fields(f"api.test:{canary.port}", "/any"))
            number = client.connection.get_next_available_stream_id()
            client.answers[number] = answer = Answer()
            head = fields(f"api.test:{canary.port}", "/t", "POST")
            client.connection.send_headers(number, head)
            placeholder = lab.secrets[0].placeholder
            client.connection.send_headers(number, [("x", placeholder)], end_stream=True)
            await client.flush()
            await client.finish(number)

        assert answer.status == 403
        assert lab.denials("secret")
    assert [seen.path for seen in canary.requests] == ["/any"]


# Secrets.


async def test_a_secret_goes_into_its_header_and_nowhere_else() -> None:
    secret = Secret("KEY", VALUE, hosts=["api.test"])

    def answer(call: Call, ended: bool) -> None:
        if ended:
            call.head(200, end=True)

    async with h2_server(answer) as server, lab_for(server, secret) as lab:
        placeholder = lab.secrets[0].placeholder
        authority = f"api.test:{server.port}"
        async with h2_client(lab, "api.test", server.port) as client:
            good = await client.ask(fields(authority, authorization=f"Bearer {placeholder}"))
            bad = [
                await client.ask(fields(authority, f"/{placeholder}")),
                await client.ask(fields(authority, x_other=placeholder)),
            ]

        assert VALUE.encode() not in b"".join(lab.lines)
    assert good.status == 200
    assert [answer.status for answer in bad] == [403, 403]
    assert [seen.get(b"authorization") for seen in server.requests] == [f"Bearer {VALUE}".encode()]


# Floods: the guest's connection ends, the gateway goes on.


@pytest.mark.parametrize("kind", ["ping", "settings", "reset", "continuation", "bomb"])
async def test_a_flood_ends_its_connection_and_nothing_else(canary: HttpServer, kind: str) -> None:
    async with lab_for(canary) as lab:
        async with h2_client(lab, "api.test", canary.port) as client:
            await client.flush()
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(_flood(client, kind, canary.port), client.read_to_end())

        async with h2_client(lab, "api.test", canary.port) as client:
            assert (await client.ask(fields(f"api.test:{canary.port}"))).status == 200
        assert lab.failure is None
        assert any(event.rule == "http" for event in lab.denials("request"))


async def _flood(client: H2Client, kind: str, port: int) -> None:
    frames = {
        "ping": lambda _: b"\0\0\x08\x06\0\0\0\0\0" + bytes(8),
        "settings": lambda _: b"\0\0\0\x04\0\0\0\0\0",
        "reset": lambda n: _opened_and_reset(client, 2 * n + 1, port),
        "continuation": lambda n: (
            (b"\0\0\0\x09\0" if n else b"\0\0\0\x01\x01") + (1).to_bytes(4, "big")
        ),
        "bomb": lambda n: b"" if n else _bomb(),
    }[kind]
    for number in range(10_000):
        if client.closed:
            return
        if data := frames(number):
            try:
                await client.stream.write(data)
            except OSError:  # closed, and the reader is about to find out
                return
        await asyncio.sleep(0)


def _opened_and_reset(client: H2Client, number: int, port: int) -> bytes:
    block = client.connection.encoder.encode(fields(f"api.test:{port}"))
    head = len(block).to_bytes(3, "big") + b"\x01\x05" + number.to_bytes(4, "big") + block
    return head + b"\0\0\x04\x03\0" + number.to_bytes(4, "big") + b"\0\0\0\x08"


def _bomb() -> bytes:
    """One field of 4 KB in the table, and ten thousand references to it."""
    block = b"\x40\x01x\x7f\xa1\x1e" + b"a" * 4000 + b"\xbe" * 10_000
    return len(block).to_bytes(3, "big") + b"\x01\x05" + (1).to_bytes(4, "big") + block


async def test_requests_and_their_heads_are_bounded_over_all_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limits of connections and streams multiply: what is left open in all of them is not more than this."""
    monkeypatch.setattr(inflight, "MAX_REQUESTS", 5)

    async with h2_server(lambda call, ended: None) as server, lab_for(server) as lab:
        authority = f"api.test:{server.port}"
        async with (
            h2_client(lab, "api.test", server.port) as one,
            h2_client(lab, "api.test", server.port) as other,
        ):
            for client, arrived in (one, 4), (other, 5):
                for _ in range(4):
                    client.open(fields(authority, method="POST"))
                await client.flush()
                await until(lambda arrived=arrived: len(server.requests) == arrived)
            while len(_refused(other)) < 3:
                await other.receive()

            crowded = await lab.connect("api.test", server.port)
            await crowded.write(f"GET / HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
            assert b" 429 " in await crowded.read_response()
            crowded.reset()
            one.stream.abort()
            await until(lambda: lab.gateway.connections == 1)
            again = [other.open(fields(authority, method="POST")) for _ in range(4)]
            await other.flush()
            await until(lambda: len(server.requests) == 9)

            assert {other.answers[number].reset for number in again} == {None}
        assert {event.rule for event in lab.denials("request")} == {"request-limit"}
        assert len(lab.denials("request")) == 4
    assert {answer.reset for answer in _refused(other)} == {ErrorCodes.REFUSED_STREAM}


def _refused(client: H2Client) -> list[Answer]:
    return [answer for answer in client.answers.values() if answer.reset is not None]


async def test_a_head_of_many_small_fields_is_refused_and_not_kept(
    canary: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An indexed field is one byte on the wire, and a hundred in memory."""
    kept: list[Asked] = []
    take = inflight.InFlight.take
    monkeypatch.setattr(
        inflight.InFlight, "take", lambda self, asked: kept.append(asked) or take(self, asked)
    )
    async with lab_for(canary) as lab, h2_client(lab, "api.test", canary.port) as client:
        authority = f"api.test:{canary.port}"
        many = await client.ask([*fields(authority), *[("x", "y")] * MAX_FIELDS])
        some = await client.ask([*fields(authority), *[("x", "y")] * 50])

    assert (many.status, some.status) == (431, 200)
    refused = kept[0].head
    assert isinstance(refused, HttpRefused)
    assert (refused.__traceback__, refused.__cause__, refused.__context__) == (None, None, None)


async def test_heads_that_are_held_are_bounded_in_bytes(
    canary: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inflight, "MAX_HEADS_BYTES", 3000)
    async with lab_for(canary) as lab, h2_client(lab, "api.test", canary.port) as client:
        authority = f"api.test:{canary.port}"
        for _ in range(3):
            assert (await client.ask(fields(authority, x="y" * 2000))).status == 200
        assert (await client.ask(fields(authority, x="y" * 3000))).reset is not None


# Servers.


@pytest.mark.parametrize(
    "frame",
    [
        b"\0\0\x08\x07\0\0\0\0\0" + bytes(8),  # GOAWAY: nothing was processed
        b"\0\0\x01\0\x08\0\0\0\x01\xff",  # padding longer than its frame
        b"\0\0\x04\x05\x04\0\0\0\x01\0\0\0\x02",  # PUSH_PROMISE
        b"\xff\xff\xff\0\0\0\0\0\x01",  # a frame of 16 MiB
        b"\0\0\x01\x01\x05\0\0\0\x01\xff",  # HPACK that is none
        b"\0\0\x01\x01\x05\0\0\0\x01\x82",  # a response with a method
    ],
)
async def test_a_hostile_server_is_a_bad_gateway(frame: bytes) -> None:
    async with h2_server(lambda call, ended: call.raw(frame)) as server, lab_for(server) as lab:
        async with h2_client(lab, "api.test", server.port) as client:
            answer = await client.ask(fields(f"api.test:{server.port}"))

        assert answer.status == 502
        assert lab.failure is None


async def test_a_server_that_sends_very_many_fields_is_a_bad_gateway() -> None:
    def answer(call: Call, ended: bool) -> None:
        many = [("x", "y")] * MAX_FIELDS
        head = [(":status", "200"), *(many if call.path == "/head" else [])]
        call.connection.send_headers(call.number, head)
        if call.path != "/head":
            call.connection.send_headers(call.number, [*many, ("z", "")], end_stream=True)

    async with (
        h2_server(answer) as server,
        lab_for(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        authority = f"api.test:{server.port}"
        head = await client.ask(fields(authority, "/head"))
        trailer = await client.ask(fields(authority, "/trailer"))

    assert (head.status, trailer.status, trailer.reset) == (502, 200, ErrorCodes.INTERNAL_ERROR)
    assert b"too many fields" in head.body


async def test_interim_answers_without_end_are_stopped_where_the_guest_does_not_read() -> None:
    tasks: list[asyncio.Task[None]] = []

    async def flood(call: Call) -> None:
        while call.seen.reset is None:
            call.head(103, link="</x>; rel=preload" + "x" * 8000)
            await asyncio.sleep(0)

    def answer(call: Call, ended: bool) -> None:
        tasks.append(asyncio.get_running_loop().create_task(flood(call)))

    async with (
        h2_server(answer) as server,
        lab_for(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        await client.send(fields(f"api.test:{server.port}"))
        async with asyncio.timeout(PATIENCE_S):
            while not server.requests or server.requests[0].reset is None:
                await asyncio.sleep(0.05)
    await asyncio.gather(*tasks)

    assert server.requests[0].reset == ErrorCodes.ENHANCE_YOUR_CALM
