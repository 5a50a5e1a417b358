"""Results and streams of guest processes, without a guest (taskvm.process, taskvm.files)."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import msgspec
import pytest

from taskvm.errors import SandboxLostError, UsageError
from taskvm.files import Files
from taskvm.port import FramePort, Inlet, StreamReset
from taskvm.process import ByteStream, ExecResult, Process
from taskvm.vm.control import Control
from taskvm.wire.control import ExecRequest
from taskvm.wire.frames import FrameType, encode_frame


@contextlib.asynccontextmanager
async def inlet() -> AsyncIterator[Inlet]:
    left, right = socket.socketpair()
    port = await FramePort.open(left, "test")
    try:
        yield Inlet(port, 1, 1)
    finally:
        port.close()
        right.close()
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("result", "outcome"),
    [
        (ExecResult(exit_code=0), "exit code 0"),
        (ExecResult(exit_code=3), "exit code 3"),
        (ExecResult(exit_code=137, signal=9), "killed by SIGKILL"),
        (ExecResult(exit_code=128 + 77, signal=77), "killed by signal 77"),
        (ExecResult(exit_code=137, signal=9, timed_out=True), "timed out"),
    ],
)
def test_an_ending_is_told_in_words(result: ExecResult, outcome: str) -> None:
    """Exit code, signal and timeout are told apart."""
    assert result.outcome.startswith(outcome)
    assert result.ok == (result.exit_code == 0)


def test_output_that_is_not_text_stays_readable() -> None:
    """Malformed bytes become U+FFFD in `stdout`, and stay themselves in `stdout_bytes`."""
    result = ExecResult(exit_code=0, stdout_bytes=b"a\xffb")

    assert (result.stdout, result.stdout_bytes) == ("a\ufffdb", b"a\xffb")


async def test_a_character_that_is_cut_comes_out_whole() -> None:
    """Text is decoded incrementally."""
    async with inlet() as source:
        for byte in "€uro".encode():
            source.feed(bytes([byte]))
        source.feed_end()
        text = "".join([piece async for piece in ByteStream(source).text()])

    assert text == "€uro"


@pytest.mark.parametrize("count", [0, -1])
async def test_no_bytes_are_no_end(count: int) -> None:
    """-1 means all to asyncio's streams; here it looked like a command that has written nothing."""
    async with inlet() as source:
        source.feed(b"there")
        with pytest.raises(UsageError, match="at least 1"):
            await ByteStream(source).read(count)


async def test_a_stream_that_the_guest_resets_ends() -> None:
    """What came is read; a reset is the end, a lost sandbox an error."""
    async with inlet() as source:
        source.feed(b"last")
        source.fail(StreamReset(104))
        reset = [data async for data in ByteStream(source)]
    async with inlet() as source:
        source.fail(SandboxLostError("read", "gone"))
        with pytest.raises(SandboxLostError):
            await ByteStream(source).read()

    assert reset == [b"last"]


@pytest.mark.parametrize("path", ["", "relative", "/with\0nul"])
async def test_a_guest_path_is_absolute(path: str) -> None:
    """A path that could mean something else is refused before anything is sent."""
    left, right = socket.socketpair()
    control = await Control.open(left)
    with right, pytest.raises(UsageError):
        await Files(control, 0, 0).read_bytes(path)
    control.close(SandboxLostError("test", "over"))
    await asyncio.sleep(0)


async def test_an_end_that_came_while_this_program_stood_still_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An hour after a command was killed its exit lies in the port: nobody looks at the clock first."""
    loop, still_s = asyncio.get_running_loop(), [0.0]
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + still_s[0])
    ours, theirs = socket.socketpair()
    control = await Control.open(ours)
    call = control.open_call(ExecRequest(argv=[b"x"], env=[], cwd=b"/"), "run x", (1, 2))

    killing = loop.create_task(Process(call, "x", pid=1).kill_all())
    await asyncio.sleep(0)
    for kind, message in ((FrameType.REPLY, {"pid": 1}), (FrameType.EXIT, {"signal": 9})):
        theirs.send(encode_frame(kind, 0, call.stream, msgspec.msgpack.encode(message)))
    still_s[0] = 3600
    await killing

    control.close(SandboxLostError("test", "over"))
    theirs.close()


def test_a_result_is_shown_with_the_beginning_of_what_was_written() -> None:
    result = ExecResult(exit_code=3, stdout_bytes=b"x" * 1_000_000, stderr_bytes=b"bad\x1b[2J\n")

    assert repr(result) == (
        f"<ExecResult exit code 3, stdout=b'{'x' * 200}' and 999800 bytes more, stderr=b'bad\\x1b[2J\\n'>"
    )
    assert repr(ExecResult(exit_code=0)) == "<ExecResult exit code 0>"
