"""HTTP/2 on both sides: taskvm.net.http2, its sides taskvm.net.http2guest and taskvm.net.http2server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h2.connection
import h2.settings
import pytest
from h2.errors import ErrorCodes
from tests.support.egress_lab import HttpServer, Lab, egress_lab, http_server
from tests.support.h2_lab import Answer, Call, H2Server, echo, fields, h2_client, h2_server
from tests.support.waiting import PATIENCE_S, until, until_settled

from taskvm.net import http2guest, http2server, inflight, relay
from taskvm.net.http2 import Http2Link
from taskvm.wire.http2 import MAX_STREAMS, STREAM_WINDOW, render_request
from taskvm.wire.message import Origin, RequestHead


@asynccontextmanager
async def sandbox(server: H2Server | HttpServer) -> AsyncIterator[Lab]:
    async with egress_lab(
        allow=["api.test"],
        allow_addresses=[f"127.0.0.1:{server.port}"],
        hosts={"api.test": ["127.0.0.1"]},
    ) as lab:
        yield lab


async def test_http2_is_spoken_on_both_sides_of_one_connection_each() -> None:
    async with (
        h2_server() as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        numbers = [await client.send(fields(f"api.test:{server.port}", f"/{n}")) for n in range(20)]
        answers = await client.finish(*numbers)

        assert [answer.body for answer in answers] == [b"/%d" % n for n in range(20)]
        assert {answer.status for answer in answers} == {200}
        connects = [e for e in lab.events if e.kind == "connect" and e.decision == "allow"]
        requests = [e for e in lab.events if e.kind == "request"]
    assert (server.connections, len(connects), len(requests)) == (1, 1, 20)
    assert server.requests[0].get(b":authority") == f"api.test:{server.port}".encode()
    assert server.push_enabled == 0


async def test_a_server_of_http1_only_is_spoken_to_in_http1() -> None:
    with http_server("api.test") as server:
        async with sandbox(server) as lab, h2_client(lab, "api.test", server.port) as client:
            authority = f"api.test:{server.port}"
            first = await client.ask(fields(authority, "/a", x_one="1"))
            posted = await client.ask(fields(authority, "/b", "POST"), b"a body without a length")
            head = await client.ask(fields(authority, "/c", "HEAD"))
            crumbs = [("cookie", "a=1"), ("x-one", "1"), ("cookie", "b=2")]
            await client.ask([*fields(authority, "/d"), *crumbs])

    assert (first.status, first.body) == (200, b"hello from the server")
    assert "alt-svc" not in first.headers
    assert posted.body == b"a body without a length"
    assert (head.status, head.body) == (200, b"")
    assert [seen.header("Host") for seen in server.requests] == [authority] * 4
    cookies = [value for name, value in server.requests[3].headers if name.lower() == "cookie"]
    assert cookies == ["a=1; b=2"]  # RFC 9113 section 8.2.3
    assert server.requests[0].header("X-One") == "1"
    assert server.requests[1].header("Transfer-Encoding") == "chunked"


async def test_a_body_streams_both_ways_and_trailers_follow() -> None:
    """What gRPC needs: messages in both directions at once, and the status in the trailer."""

    def answer(call: Call, ended: bool) -> None:
        if not ended:
            call.head(200, content_type="application/grpc")
            call.data(b"early")
        else:
            call.data(b"late")
            call.trailers(grpc_status="0", grpc_message="fine")

    async with (
        h2_server(answer) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        head = fields(f"api.test:{server.port}", "/pkg.Service/Call", "POST", te="trailers")
        number = client.connection.get_next_available_stream_id()
        client.answers[number] = reply = Answer()
        client.connection.send_headers(number, head)
        await client.flush()
        while reply.body != b"early":
            await client.receive()
        client.connection.send_data(number, b"message")
        client.connection.send_headers(number, [("x-sum", "1")], end_stream=True)
        await client.flush()
        await client.finish(number)

    assert reply.body == b"earlylate"
    assert reply.trailers == {"grpc-status": "0", "grpc-message": "fine"}
    assert server.requests[0].get(b"te") == b"trailers"
    assert server.requests[0].body == b"message"
    assert server.requests[0].trailers == [(b"x-sum", b"1")]


async def test_an_answer_of_a_head_alone_stays_one() -> None:
    """gRPC's Trailers-Only: the stream ends with its first head."""
    async with (
        h2_server(lambda call, ended: call.head(200, end=True, grpc_status="5")) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        number = await client.send(fields(f"api.test:{server.port}", "/", "POST"), b"")
        ended_with_head = False
        while not client.answers[number].status:
            await client.receive()
            ended_with_head = client.answers[number].ended

    assert ended_with_head
    assert client.answers[number].headers["grpc-status"] == "5"


async def test_large_bodies_pass_whole_and_flow_control_holds() -> None:
    body = bytes(range(256)) * 8192  # 2 MiB: eight windows of a stream

    def answer(call: Call, ended: bool) -> None:
        if call.path == "/sink" and ended:
            call.head(200)
            call.data(str(len(call.seen.body)).encode(), end=True)

    async with (
        h2_server(answer) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        sunk = await client.ask(fields(f"api.test:{server.port}", "/sink", "POST"), body)
    with http_server("api.test") as plain:
        async with sandbox(plain) as lab, h2_client(lab, "api.test", plain.port) as client:
            echoed = await client.ask(fields(f"api.test:{plain.port}", "/", "POST"), body)

    assert sunk.body == b"2097152"
    assert server.requests[0].body == body
    assert echoed.body == body


async def test_a_stream_that_is_not_read_stops_its_server_and_no_other_stream() -> None:
    """The windows bound what is held; another stream of the same connection goes on."""
    sent = 0

    def answer(call: Call, ended: bool) -> None:
        nonlocal sent
        if call.path == "/small":
            echo(call, ended)
            return
        call.head(200)
        while room := min(call.connection.local_flow_control_window(call.number), 16384):
            call.data(b"x" * room)
            sent += room

    async with (
        h2_server(answer) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        authority = f"api.test:{server.port}"
        client.reads = False
        client.connection.increment_flow_control_window(2**20)
        await client.send(fields(authority, "/big"))
        small = await client.ask(fields(authority, "/small"))
        await until_settled(lambda: sent)

    assert small.body == b"/small"
    assert sent <= 2 * STREAM_WINDOW


async def test_a_cancelled_request_is_cancelled_at_the_server() -> None:
    def answer(call: Call, ended: bool) -> None:
        if ended:
            call.head(200)

    async with (
        h2_server(answer) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        number = await client.send(fields(f"api.test:{server.port}", "/", "POST"), b"x")
        while not client.answers[number].status:
            await client.receive()
        client.connection.reset_stream(number, ErrorCodes.CANCEL)
        await client.flush()
        async with asyncio.timeout(PATIENCE_S):
            while server.requests[0].reset is None:
                await asyncio.sleep(0.01)
        again = await client.send(fields(f"api.test:{server.port}", "/again"))
        while not client.answers[again].status:
            await client.receive()

        ended = [e for e in lab.events if e.kind == "response"]
    assert server.requests[0].reset == ErrorCodes.CANCEL
    assert ended[0].decision == "error"


async def test_a_stream_that_the_server_resets_is_reset_with_its_code() -> None:
    def answer(call: Call, ended: bool) -> None:
        if call.path == "/late":
            call.head(200)
        call.reset(ErrorCodes.ENHANCE_YOUR_CALM)

    async with (
        h2_server(answer) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        late = await client.ask(fields(f"api.test:{server.port}", "/late"))
        early = await client.ask(fields(f"api.test:{server.port}", "/early"))

    assert late.reset == ErrorCodes.ENHANCE_YOUR_CALM
    assert early.status == 502
    assert b"the server reset the stream" in early.body


async def test_a_server_that_goes_away_finishes_what_it_has_begun() -> None:
    """nginx does so after a thousand requests: GOAWAY, and the open streams end as usual."""

    def answer(call: Call, ended: bool) -> None:
        call.head(200)
        if call.path == "/first":
            call.raw(b"\0\0\x08\x07\0\0\0\0\0" + call.number.to_bytes(4, "big") + bytes(4))
        call.data(b"whole", end=True)

    async with (
        h2_server(answer) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        first = await client.ask(fields(f"api.test:{server.port}", "/first"))
        second = await client.ask(fields(f"api.test:{server.port}", "/second"))

    assert (first.body, second.body) == (b"whole", b"whole")
    assert server.connections == 2


async def test_an_early_final_answer_is_delivered_and_the_upload_is_stopped() -> None:
    def answer(call: Call, ended: bool) -> None:
        if not ended:
            call.head(413)
            call.data(b"big", end=True)

    async with (
        h2_server(answer) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        number = client.connection.get_next_available_stream_id()
        client.answers[number] = reply = Answer()
        client.connection.send_headers(
            number, fields(f"api.test:{server.port}", "/", "POST", content_length="99999")
        )
        client.connection.send_data(number, b"x" * 1000)
        await client.flush()
        await client.finish(number)
        while reply.reset is None:
            await client.receive()

    assert (reply.status, reply.body, reply.reset) == (413, b"big", ErrorCodes.NO_ERROR)


async def test_an_interim_answer_and_an_expectation_pass() -> None:
    async with (
        h2_server(_continue) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        head = fields(f"api.test:{server.port}", "/", "PUT", expect="100-continue")
        number = client.connection.get_next_available_stream_id()
        client.answers[number] = reply = Answer()
        client.connection.send_headers(number, head)
        await client.flush()
        while not reply.informational:
            await client.receive()
        await client.write(number, b"now", end=True)
        await client.finish(number)

    assert (reply.informational, reply.body) == ([100], b"now")


def _continue(call: Call, ended: bool) -> None:
    if ended:
        echo(call, ended)
    else:
        call.head(100)


async def test_more_streams_than_the_server_takes_wait_for_their_turn() -> None:
    waiting: list[Call] = []

    def answer(call: Call, ended: bool) -> None:
        waiting.append(call)
        assert len(waiting) <= 2
        if len(waiting) == 1:
            settings = {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 2}
            call.connection.update_settings(settings)
        loop = asyncio.get_running_loop()
        loop.call_later(0.02, lambda: (waiting.remove(call), call.head(200, end=True)))

    async with (
        h2_server(answer) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        await client.ask(fields(f"api.test:{server.port}"))
        numbers = [await client.send(fields(f"api.test:{server.port}")) for _ in range(6)]
        answers = await client.finish(*numbers)

    assert [answer.status for answer in answers] == [200] * 6


async def test_a_server_that_takes_streams_later_is_waited_for() -> None:
    """It may begin with none (RFC 9113 section 6.5.2), and its SETTINGS is all that comes."""

    def answer(call: Call, ended: bool) -> None:
        if call.path == "/first":
            allow(call.connection, 0)
            loop.call_later(0.1, lambda: (allow(call.connection, 100), call.flush()))
        call.head(200, end=True)

    def allow(connection: h2.connection.H2Connection, number: int) -> None:
        connection.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: number})

    loop = asyncio.get_running_loop()
    async with (
        h2_server(answer) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        first = await client.ask(fields(f"api.test:{server.port}", "/first"))
        second = await client.ask(fields(f"api.test:{server.port}", "/second"))

    assert (first.status, second.status) == (200, 200)
    assert server.connections == 1


async def test_a_server_that_never_takes_a_stream_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(call: Call, ended: bool) -> None:
        call.connection.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 0})
        call.head(200, end=True)

    async with (
        h2_server(answer) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        first = await client.ask(fields(f"api.test:{server.port}"))
        monkeypatch.setattr(relay, "STALL_TIMEOUT_S", 0.1)
        second = await client.ask(fields(f"api.test:{server.port}"))

    assert (first.status, second.status) == (200, 502)
    assert b"nothing moved for too long" in second.body


async def test_a_stream_that_the_server_has_just_ceased_to_take_is_a_bad_gateway() -> None:
    async with h2_server() as server, sandbox(server) as lab:
        async with h2_client(lab, "api.test", server.port) as client:
            await client.ask(fields(f"api.test:{server.port}"))
            open_stream = http2server.Http2Link.open_stream

            def late(link: http2server.Http2Link, *given: object, **more: object) -> object:
                link._h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 0
                link._h2.remote_settings.acknowledge()
                return open_stream(link, *given, **more)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(http2server.Http2Link, "open_stream", late)
                answer = await client.ask(fields(f"api.test:{server.port}"))
        assert not [event for event in lab.events if event.reason == "internal error"]

    assert answer.status == 502


async def test_a_connection_without_requests_is_closed_with_a_goaway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http2guest, "IDLE_TIMEOUT_S", 3.0)
    async with (
        h2_server() as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        await client.ask(fields(f"api.test:{server.port}"))
        await client.read_to_end()

    assert client.goaway == ErrorCodes.NO_ERROR


async def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "STALL_TIMEOUT_S", 0.1)
    async with (
        h2_server(lambda call, ended: None) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        answer = await client.ask(fields(f"api.test:{server.port}"))

    assert answer.status == 502
    assert b"nothing moved for too long" in answer.body


async def test_what_cannot_be_reached_is_a_bad_gateway_on_its_stream() -> None:
    async with egress_lab(allow=["gone.test"]) as lab, h2_client(lab, "gone.test", 443) as client:
        answers = [await client.ask(fields("gone.test")) for _ in range(2)]

    assert [answer.status for answer in answers] == [502, 502]


async def test_a_guest_that_leaves_takes_its_servers_connections_along() -> None:
    async with (
        h2_server(lambda call, ended: None) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        await client.send(fields(f"api.test:{server.port}"))
        async with asyncio.timeout(PATIENCE_S):
            while not server.requests:
                await asyncio.sleep(0.01)
            client.stream.abort()
            while lab.gateway.connections:
                await asyncio.sleep(0.01)


async def test_a_large_body_passes_through_the_least_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a sandbox has many connections, the later ones have the windows that HTTP/2 begins with."""
    monkeypatch.setattr(inflight, "WINDOWS_BYTES", 0)
    body = bytes(range(256)) * 2048

    def answer(call: Call, ended: bool) -> None:
        if ended:
            call.head(200, end=True)

    async with (
        h2_server(answer) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        await client.ask(fields(f"api.test:{server.port}", "/sink", "POST"), body)
        room = client.connection.outbound_flow_control_window

    assert server.requests[0].body == body
    assert room <= inflight.LEAST_WINDOW


class _Stuck:
    """A connection whose peer neither sends nor takes anything, and that is slow to let go."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.go_on = asyncio.Event()
        self.writing = False

    async def read(self, max_bytes: int = 0) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def write(self, data: bytes) -> None:
        self.writing = True
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
            await self.go_on.wait()

    async def end(self) -> None: ...

    def abort(self) -> None: ...


async def test_a_stream_is_let_go_while_its_connection_is_being_ended() -> None:
    """A policy is narrowed, a sandbox closes: requests and their connections end in any order."""
    stuck = _Stuck()
    link = Http2Link(stuck)
    head = render_request(RequestHead(b"GET", b"/", []), Origin("https", "api.test", 443))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(link.run())
        await until(lambda: stuck.writing)
        stream = link.open_stream(head, end=False)
        running.cancel()
        await stuck.cancelled.wait()
        try:
            stream.release(ErrorCodes.CANCEL)
        finally:
            stuck.go_on.set()

    assert stream.error is not None


async def test_a_guest_has_no_more_streams_than_it_was_told() -> None:
    async with (
        h2_server(lambda call, ended: None) as server,
        sandbox(server) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        client.connection.remote_settings.max_concurrent_streams = 2**31
        for _ in range(MAX_STREAMS + 1):
            await client.send(fields(f"api.test:{server.port}"))
        await client.read_to_end()

    assert client.goaway is not None
    assert len(server.requests) <= MAX_STREAMS
