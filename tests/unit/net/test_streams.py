"""The guest's stream: bytes that are put back, and no RESET for a stream that is over."""

from __future__ import annotations

import errno

from taskvm.net.streams import GuestStream
from taskvm.port import FramePort, Inlet, Outlet
from taskvm.wire.frames import FrameType


class Recorder(FramePort):
    """A port that keeps what it is given to send."""

    def __init__(self) -> None:
        super().__init__("taskvm.net")
        self.sent: list[tuple[FrameType, bytes]] = []

    def send(
        self,
        kind: FrameType,
        channel: int,
        stream: int,
        payload: bytes | memoryview = b"",
        *,
        urgent: bool = False,
    ) -> None:
        self.sent.append((kind, bytes(payload)))


def make() -> tuple[GuestStream, Inlet, Recorder]:
    port = Recorder()
    inlet = Inlet(port, 0x80000001, 0)
    return GuestStream(inlet, Outlet(port, 0x80000001, 0)), inlet, port


async def test_bytes_that_were_looked_at_are_read_again() -> None:
    stream, inlet, _ = make()
    inlet.feed(b"abcdef")

    seen = await stream.read()
    stream.unread(seen)

    assert [await stream.read(4), await stream.read(4)] == [b"abcd", b"ef"]


async def test_an_aborted_stream_is_reset_once() -> None:
    stream, _, port = make()

    stream.abort(errno.ECONNREFUSED)
    stream.abort()

    assert port.sent == [(FrameType.RESET, b"\x6f\x00\x00\x00")]


async def test_a_stream_that_both_sides_ended_is_not_reset() -> None:
    stream, inlet, port = make()

    await stream.end()
    inlet.feed_end()
    stream.abort()

    assert port.sent == [(FrameType.END, b"")]


async def test_a_stream_that_one_side_ended_is_reset() -> None:
    stream, _, port = make()

    await stream.end()
    stream.abort()

    assert [kind for kind, _ in port.sent] == [FrameType.END, FrameType.RESET]
