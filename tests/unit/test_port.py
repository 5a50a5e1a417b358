"""The asyncio port: credit in both directions, bounded memory, resets, rest."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm.errors import GuestProtocolError, SandboxLostError
from taskvm.port import WRITE_HIGH_WATER, FramePort, Inlet, Outlet, StreamReset
from taskvm.wire.frames import (
    INITIAL_CREDIT,
    MAX_DATA,
    Frame,
    FrameType,
    decode_u32,
    encode_u32,
)


class Peer:
    """A port whose frames are kept."""

    def __init__(self, port: FramePort) -> None:
        self.port = port
        self.frames: list[Frame] = []
        self.lost: list[Exception] = []
        port.on_frame = self.frames.append
        port.on_lost = self.lost.append

    async def until(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.frames) < count:
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[Peer, Peer]]:
    left, right = socket.socketpair()
    ours = Peer(await FramePort.open(left, "test"))
    theirs = Peer(await FramePort.open(right, "guest"))
    try:
        yield ours, theirs
    finally:
        ours.port.close()
        theirs.port.close()
        await asyncio.sleep(0)


async def test_a_writer_stops_when_its_credit_is_spent() -> None:
    """No byte beyond the window is sent until the receiver grants more."""
    async with pair() as (ours, theirs), asyncio.TaskGroup() as group:
        outlet = Outlet(ours.port, 1, 0)
        writing = group.create_task(outlet.write(b"x" * (INITIAL_CREDIT + MAX_DATA)))
        await theirs.until(INITIAL_CREDIT // MAX_DATA)
        await asyncio.sleep(0.02)
        sent_before = sum(len(frame.payload) for frame in theirs.frames)
        outlet.feed_credit(MAX_DATA)
        await writing
        await theirs.until(INITIAL_CREDIT // MAX_DATA + 1)

    assert sent_before == INITIAL_CREDIT
    assert sum(len(frame.payload) for frame in theirs.frames) == INITIAL_CREDIT + MAX_DATA


async def test_a_reader_grants_what_it_has_consumed() -> None:
    """Credit comes back for bytes that were read, and only for those."""
    async with pair() as (ours, theirs):
        inlet = Inlet(ours.port, 1, 1)
        for _ in range(INITIAL_CREDIT // MAX_DATA):
            inlet.feed(b"y" * MAX_DATA)
        read = b""
        while len(read) < INITIAL_CREDIT:
            read += await inlet.read()
        await theirs.until(2)
        granted = sum(decode_u32(frame.payload) for frame in theirs.frames)

    assert read == b"y" * INITIAL_CREDIT
    assert granted == INITIAL_CREDIT


async def test_more_data_than_credit_ends_the_port() -> None:
    """A guest that ignores the window is ended; nothing beyond the window is kept."""
    async with pair() as (ours, _):
        inlet = Inlet(ours.port, 1, 1, window=10)
        inlet.feed(b"0123456789")
        inlet.feed(b"!")

    assert [type(error) for error in ours.lost] == [GuestProtocolError]


async def test_bytes_before_a_failure_are_read_first() -> None:
    """What arrived in order stays readable, then the failure shows."""
    async with pair() as (ours, _):
        inlet = Inlet(ours.port, 1, 1)
        inlet.feed(b"last words")
        inlet.fail(StreamReset(104))
        words = await inlet.read()
        with pytest.raises(StreamReset):
            await inlet.read()

    assert words == b"last words"


async def test_a_discarding_inlet_grants_without_keeping() -> None:
    """A writer whose output nobody wants can still come to its end."""
    async with pair() as (ours, theirs):
        inlet = Inlet(ours.port, 1, 1)
        inlet.discard()
        for _ in range(INITIAL_CREDIT // MAX_DATA):
            inlet.feed(b"z" * MAX_DATA)
        inlet.feed_end()
        await theirs.until(2)
        rest = await inlet.read()

    assert rest == b""
    assert sum(decode_u32(frame.payload) for frame in theirs.frames) == INITIAL_CREDIT


async def test_reset_tells_the_guest_and_stops_the_writer() -> None:
    """RESET carries the errno; writing afterwards raises."""
    async with pair() as (ours, theirs):
        outlet = Outlet(ours.port, 9, 0)
        outlet.reset(32)
        await theirs.until(1)
        with pytest.raises(StreamReset):
            await outlet.write(b"more")

    frame = theirs.frames[0]
    assert (frame.type, frame.stream, bytes(frame.payload)) == (
        FrameType.RESET,
        9,
        encode_u32(32),
    )


async def test_quiesce_waits_for_the_answer() -> None:
    """`quiesce` returns when the guest says QUIESCED, and not before."""
    async with pair() as (ours, theirs), asyncio.TaskGroup() as group:
        resting = group.create_task(ours.port.quiesce())
        await theirs.until(1)
        before = resting.done()
        theirs.port.send(FrameType.QUIESCED, 0, 0)
        await resting

    assert not before
    assert theirs.frames[0].type is FrameType.QUIESCE


async def test_sending_on_a_lost_port_says_so() -> None:
    """A port whose guest is gone raises SandboxLostError with the reason."""
    async with pair() as (ours, theirs):
        theirs.port.close()
        async with asyncio.timeout(PATIENCE_S):
            while not ours.lost:
                await asyncio.sleep(0.001)
        with pytest.raises(SandboxLostError):
            ours.port.send(FrameType.RESUME, 0, 0)


async def test_a_flood_of_small_frames_leaves_others_their_turns() -> None:
    """Twenty thousand one-byte frames arrive whole and in order, and a neighbour's turns come in between."""
    async with pair() as (ours, theirs):
        inlet = Inlet(ours.port, 1, 1)
        turns = 0
        ours.port.on_frame = lambda frame: inlet.feed(frame.payload)
        for number in range(20_000):
            theirs.port.send(FrameType.DATA, 1, 1, bytes([number % 251]))
        got = b""
        while len(got) < 20_000:
            turns += 1
            await asyncio.sleep(0)
            if inlet._chunks:
                got += await inlet.read()

    assert got == bytes(number % 251 for number in range(20_000))
    assert turns >= 20_000 // 512


async def test_many_small_chunks_cost_no_more_than_their_bytes() -> None:
    """Reading a window that came in single bytes is linear work."""
    async with pair() as (ours, _):
        inlet = Inlet(ours.port, 1, 1)
        for _ in range(INITIAL_CREDIT):
            inlet.feed(b"x")
        inlet.feed_end()
        async with asyncio.timeout(PATIENCE_S):  # a hang limit: quadratic work took minutes
            got = b"".join([data async for data in inlet])

    assert got == b"x" * INITIAL_CREDIT


# Holding.


async def test_a_held_port_keeps_what_is_sent_in_order_and_tells_of_it() -> None:
    """Only what is urgent passes. A writer of much waits instead of being kept."""
    async with pair() as (ours, theirs), asyncio.TaskGroup() as group:
        held: list[int] = []
        ours.port.on_held = lambda: held.append(1)
        ours.port.hold()
        ours.port.send(FrameType.OPEN, 0, 1, b"first")
        ours.port.send(FrameType.OPEN, 0, 2, b"second" * 1000)
        ours.port.send(FrameType.OPEN, 0, 3, b"urgent", urgent=True)
        writing = group.create_task(Outlet(ours.port, 2, 0).write(b"x" * MAX_DATA))
        await theirs.until(1)
        await asyncio.sleep(0.02)
        came_early = [frame.stream for frame in theirs.frames]

        ours.port.release()
        await writing
        await theirs.until(4)

    assert came_early == [3]
    assert len(held) == 2
    assert [(frame.type, frame.stream) for frame in theirs.frames[1:]] == [
        (FrameType.OPEN, 1),
        (FrameType.OPEN, 2),
        (FrameType.DATA, 2),
    ]


async def test_a_port_that_is_lost_while_held_frees_its_writers() -> None:
    async with pair() as (ours, theirs):
        ours.port.hold()
        theirs.port.close()
        async with asyncio.timeout(PATIENCE_S):
            await ours.port.wait_writable()
        ours.port.release()

        with pytest.raises(SandboxLostError):
            ours.port.send(FrameType.OPEN, 0, 1)


async def test_writers_wait_on_after_a_hold_of_a_port_whose_peer_does_not_read() -> None:
    """Else they fill the host's memory: nothing would ever stop them again."""
    left, right = socket.socketpair()
    with right:
        port = await FramePort.open(left, "test")
        waiting = asyncio.get_running_loop().create_task(_fill(port))
        await asyncio.sleep(0)
        port.hold()
        port.release()
        await asyncio.sleep(0)
        waits_on = not waiting.done()
        port.close()
        await waiting

    assert waits_on


async def _fill(port: FramePort) -> None:
    for _ in range(4 * WRITE_HIGH_WATER // MAX_DATA):
        port.send(FrameType.DATA, 0, 1, b"x" * MAX_DATA)
    await port.wait_writable()
