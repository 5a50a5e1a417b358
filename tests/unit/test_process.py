"""Results and streams of guest processes, without a guest (taskvm.process, taskvm.files)."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from taskvm.errors import SandboxLostError, UsageError
from taskvm.files import Files
from taskvm.port import FramePort, Inlet, StreamReset
from taskvm.process import ByteStream, ExecResult
from taskvm.vm.control import Control


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
