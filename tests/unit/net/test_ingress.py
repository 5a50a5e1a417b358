"""The way in against a guest that is played by the test: real listeners and clients, frames by hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import msgspec
import pytest
from tests.support.egress_lab import Lab, egress_lab
from tests.support.waiting import PATIENCE_S, until_settled

from taskvm.errors import GuestProtocolError, HostError, SandboxLostError, UsageError
from taskvm.net import ingress
from taskvm.net.ingress import Forward
from taskvm.port import Outlet
from taskvm.wire.frames import (
    GUEST_STREAM_BIT,
    INITIAL_CREDIT,
    MAX_DATA,
    Frame,
    FrameType,
    decode_u32,
    encode_u32,
)

EMPTY_MAP = msgspec.msgpack.encode({})


class Agent:
    """The guest's end of the net port, whose frames are kept; the test decides what it answers."""

    def __init__(self, lab: Lab) -> None:
        self.port = lab.guest.port
        self.frames: list[Frame] = []
        self.outlets: dict[int, Outlet] = {}
        self.port.on_frame = self._on_frame

    def _on_frame(self, frame: Frame) -> None:
        kept = Frame(frame.type, frame.channel, frame.stream, bytes(frame.payload))
        self.frames.append(kept)
        if frame.type is FrameType.CREDIT and frame.stream in self.outlets:
            self.outlets[frame.stream].feed_credit(decode_u32(kept.payload))

    async def seen(self, kind: FrameType) -> Frame:
        """Wait for a frame of this kind and return the first."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for frame in self.frames:
                    if frame.type is kind:
                        return frame
                await asyncio.sleep(0.002)

    async def accept(self) -> int:
        """Agree to the OPEN and return its stream."""
        number = (await self.seen(FrameType.OPEN)).stream
        self.outlets[number] = Outlet(self.port, number, 0)
        self.port.send(FrameType.REPLY, 0, number, EMPTY_MAP)
        return number


@contextlib.asynccontextmanager
async def forwarded(**options: object) -> AsyncIterator[tuple[Lab, Agent, Forward]]:
    """A sandbox's network with port 8000 of its guest forwarded."""
    async with egress_lab(**options) as lab:  # type: ignore[arg-type]  # options are the lab's
        agent = Agent(lab)
        async with lab.gateway.ingress.forward(8000, "127.0.0.1", 0) as forward:
            yield lab, agent, forward


async def lost(lab: Lab) -> Exception:
    async with asyncio.timeout(PATIENCE_S):
        while lab.failure is None:
            await asyncio.sleep(0.002)
    return lab.failure


async def refused(forward: Forward) -> bool:
    try:
        _, writer = await asyncio.open_connection(forward.host, forward.port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def broken_off(reader: asyncio.StreamReader) -> bool:
    """Whether the connection ends with a reset within five seconds."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            await reader.read()
        except ConnectionResetError:
            return True
    return False


async def test_a_connection_asks_the_guest_for_its_own_loopback() -> None:
    async with forwarded() as (_, agent, forward):
        _, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        frame = await agent.seen(FrameType.OPEN)
        writer.close()

    assert not frame.stream & GUEST_STREAM_BIT
    assert msgspec.msgpack.decode(frame.payload) == {
        "op": "connect", "addr": "127.0.0.1", "port": 8000,
    }  # fmt: skip


async def test_it_listens_on_the_loopback_only_and_says_where() -> None:
    async with forwarded() as (_, _, forward):
        elsewhere = socket.socket()
        elsewhere.settimeout(2)
        outcome = elsewhere.connect_ex(("127.0.0.2", forward.port))
        elsewhere.close()

        assert (forward.host, forward.guest_port) == ("127.0.0.1", 8000)
        assert str(forward) == f"127.0.0.1:{forward.port}"
        assert outcome != 0


@pytest.mark.parametrize(
    "frame",
    [
        (FrameType.DATA, 0, 1, b"before the reply"),
        (FrameType.END, 0, 1, b""),
        (FrameType.CREDIT, 0, 1, encode_u32(1)),
        (FrameType.REPLY, 0, 1, b"\xff garbage"),
        (FrameType.REPLY, 0, 1, msgspec.msgpack.encode({"port": 1})),
        (FrameType.REPLY, 0, 1, msgspec.msgpack.encode({"errno": -1, "call": "connect"})),
        (FrameType.REPLY, 1, 1, EMPTY_MAP),
        (FrameType.RESET, 0, 1, encode_u32(0)),
        (FrameType.RESET, 0, 1, encode_u32(2**32 - 1)),
        (FrameType.OPEN, 0, 1, msgspec.msgpack.encode({"op": "connect"})),
        (FrameType.DATAGRAM, 0, 1, b"query"),
        (FrameType.EXIT, 0, 1, EMPTY_MAP),
        (FrameType.REPLY, 0, 2, EMPTY_MAP),
        (FrameType.DATA, 0, GUEST_STREAM_BIT - 1, b"never opened"),
        (FrameType.HELLO, 0, 0, EMPTY_MAP),
    ],
)
async def test_garbage_on_a_stream_of_the_host_costs_the_guest_its_port(
    frame: tuple[FrameType, int, int, bytes],
) -> None:
    """The sandbox is lost, its listener closes, the client is broken off, and the host goes on."""
    async with forwarded() as (lab, agent, forward):
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        assert (await agent.seen(FrameType.OPEN)).stream == 1
        agent.port.send(*frame)

        assert isinstance(await lost(lab), GuestProtocolError)
        assert await broken_off(reader)
        assert await refused(forward)
        with pytest.raises(SandboxLostError):
            lab.gateway.ingress.listen(8001)
        writer.close()


@pytest.mark.parametrize(
    "frames",
    [
        [(FrameType.REPLY, EMPTY_MAP)],
        [(FrameType.DATA, b"x" * MAX_DATA)] * (INITIAL_CREDIT // MAX_DATA + 400),
        [(FrameType.END, b""), (FrameType.DATA, b"after the end")],
        [(FrameType.CREDIT, encode_u32(2**31 - 1))],
    ],
    ids=["a second reply", "more than credit", "data after the end", "credit overflow"],
)
async def test_a_guest_that_breaks_the_rules_of_an_open_stream_loses_its_port(
    frames: list[tuple[FrameType, bytes]],
) -> None:
    async with forwarded() as (lab, agent, forward):
        _, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        number = await agent.accept()
        for kind, payload in frames:
            agent.port.send(kind, 0, number, payload)

        assert isinstance(await lost(lab), GuestProtocolError)
        writer.close()


async def test_the_guest_cannot_open_a_listener_or_a_way_in() -> None:
    """An OPEN of the guest's is an outgoing connection or a protocol error; nothing of the host listens after it."""
    async with egress_lab() as lab:
        lab.guest.port.send(
            FrameType.OPEN, 0, GUEST_STREAM_BIT | 1,
            msgspec.msgpack.encode({"op": "listen", "addr": "0.0.0.0", "port": 8000}),
        )  # fmt: skip

        assert isinstance(await lost(lab), GuestProtocolError)
        assert [event.kind for event in lab.events] == []


async def test_a_late_frame_of_a_stream_that_is_over_is_dropped() -> None:
    async with forwarded() as (lab, agent, forward):
        _, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        number = await agent.accept()
        agent.port.send(FrameType.RESET, 0, number, encode_u32(104))
        agent.port.send(FrameType.DATA, 0, number, b"late")
        async with asyncio.timeout(PATIENCE_S):
            while lab.gateway.connections:
                await asyncio.sleep(0.002)
        agent.port.send(FrameType.CREDIT, 0, number, encode_u32(5))
        await asyncio.sleep(0.05)

        assert lab.failure is None
        writer.close()


async def test_a_guest_that_breaks_off_after_its_end_frees_an_idle_client() -> None:
    """END and then RESET: nobody reads the guest's side any more, and the client hears of it."""
    async with forwarded() as (lab, agent, forward):
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        number = await agent.accept()
        agent.port.send(FrameType.END, 0, number)
        assert await reader.read() == b""
        agent.port.send(FrameType.RESET, 0, number, encode_u32(104))
        async with asyncio.timeout(PATIENCE_S):
            while lab.gateway.connections:
                await asyncio.sleep(0.002)

        assert lab.events[-1].decision == "error"
        writer.close()


async def test_a_client_that_reads_slowly_slows_the_guest_down() -> None:
    """Of 48 MiB no more than a window and the kernel's buffers leave the guest before the client reads."""
    total, sent = 48 * 1024 * 1024, 0
    async with forwarded() as (_, agent, forward):
        client = socket.socket()
        # Else it grows as the host allows.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.connect(("127.0.0.1", forward.port))
        client.setblocking(False)
        number = await agent.accept()

        async def produce() -> None:
            nonlocal sent
            while sent < total:
                await agent.outlets[number].write(b"y" * MAX_DATA)
                sent += MAX_DATA
            agent.outlets[number].end()

        async with asyncio.TaskGroup() as group, asyncio.timeout(PATIENCE_S):
            group.create_task(produce())
            before = await until_settled(lambda: sent)
            received = 0
            while data := await asyncio.get_running_loop().sock_recv(client, 1 << 20):
                received += len(data)
        client.close()

    assert before < 16 * 1024 * 1024
    assert received == total


async def test_a_client_beyond_the_limit_is_broken_off_and_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingress, "MAX_CONNECTIONS", 1)
    async with forwarded() as (lab, agent, forward):
        _, first = await asyncio.open_connection("127.0.0.1", forward.port)
        await agent.accept()
        reader, second = await asyncio.open_connection("127.0.0.1", forward.port)

        assert await broken_off(reader)
        denied = [event for event in lab.events if event.decision == "deny"]
        assert [(e.kind, e.rule, e.guest_port) for e in denied] == [
            ("ingress", "connection-limit", 8000)
        ]
        first.close()
        second.close()


async def test_a_host_that_is_short_of_descriptors_takes_no_more_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingress, "keep_room", lambda descriptor: False)
    async with forwarded() as (lab, _, forward):
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)

        assert await broken_off(reader)
        assert lab.events[-1].reason == "this process has too many files open"
        writer.close()


async def test_a_refusal_of_the_guest_breaks_the_client_off() -> None:
    async with forwarded() as (lab, agent, forward):
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        number = (await agent.seen(FrameType.OPEN)).stream
        answer = msgspec.msgpack.encode({"errno": 111, "call": "connect"})
        agent.port.send(FrameType.REPLY, 0, number, answer)

        assert await broken_off(reader)
        assert "Connection refused (connect)" in lab.events[-1].reason
        assert lab.failure is None
        writer.close()


async def test_close_ends_the_listener_and_its_connections() -> None:
    async with forwarded() as (_, agent, forward):
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        number = await agent.accept()
        await asyncio.sleep(0.05)
        await forward.close()
        await forward.close()

        assert await broken_off(reader)
        assert (await agent.seen(FrameType.RESET)).stream == number
        assert await refused(forward)
        writer.close()


async def test_what_cannot_be_recorded_is_not_opened() -> None:
    async with egress_lab(max_log_bytes=10) as lab:
        with pytest.raises(HostError, match="audit log"):
            await lab.gateway.ingress.forward(8000, "127.0.0.1", 0)


async def test_an_address_in_use_is_an_error_of_the_host() -> None:
    async with forwarded() as (lab, _, forward):
        with pytest.raises(HostError, match="already in use"):
            lab.gateway.ingress.listen(8000, "127.0.0.1", forward.port)


@pytest.mark.parametrize(
    ("guest_port", "host", "host_port"),
    [(0, "127.0.0.1", 0), (65536, "127.0.0.1", 0), (80, "localhost", 0), (80, "", 0), (80, "::1", -1)],
)  # fmt: skip
async def test_a_wrong_address_is_refused(guest_port: int, host: str, host_port: int) -> None:
    async with egress_lab() as lab:
        with pytest.raises(UsageError, match="forward"):
            lab.gateway.ingress.listen(guest_port, host, host_port)
        assert lab.events == []


async def test_a_listener_may_have_an_ipv6_address() -> None:
    async with egress_lab() as lab:
        forward = lab.gateway.ingress.listen(80, "::1")

        assert str(forward) == f"[::1]:{forward.port}"
        await forward.close()
