"""A command in a sandbox of the supervisor, as a client has it in hand. Leaving it leaves the command running."""

from __future__ import annotations

import contextlib
import signal as signals
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

import msgspec

from taskvm.arguments import check_signal
from taskvm.errors import SandboxLostError, SandboxStateError, UsageError
from taskvm.port import StreamReset
from taskvm.process import ByteStream, ExecResult, pty_size
from taskvm.resources import ExecUsage
from taskvm.supervisor.ports import Caller
from taskvm.wire.supervision import Ended, ExecStatus, Kill, Notice, Resize


class Attachment:
    """A command that this program is attached to; leave it by leaving `async with`, or by `detach`.

    `stdout` and `stderr` begin with what is kept of the past output; what a terminal's command writes faster than it
    is read here is skipped, and counted in `skipped`. With a terminal all output is in `stdout`. `number` is its
    `Process.id`, which the audit record's `exec` repeats.
    """

    def __init__(
        self, caller: Caller, status: ExecStatus, kill_left: Callable[[], Awaitable[None]]
    ) -> None:
        self._caller = caller
        self._kill_left = kill_left
        self.number: int = status.number
        self.command: str = status.command
        self.pty: bool = status.pty
        self.stdout: ByteStream = ByteStream(caller.outputs[1])
        self.stderr: ByteStream = ByteStream(caller.outputs[2])
        self._skipped = 0
        caller.on_notice = self._take

    @property
    def skipped(self) -> int:
        """How many bytes of output have been dropped because they were not read in time."""
        return self._skipped

    async def write(self, data: bytes) -> None:
        """Write to standard input, waiting while the command does not read. Raises BrokenPipeError after its end."""
        try:
            await self._caller.input.write(data)
        except StreamReset as error:
            raise BrokenPipeError(32, "the supervisor has dropped the command") from error

    async def close_stdin(self) -> None:
        """Close the command's standard input, for everybody who is attached. Idempotent."""
        self._caller.input.end()

    async def kill(self, signal: int = signals.SIGTERM) -> None:
        """Send `signal` to the command's group. Nothing happens when it has ended. Raises UsageError for none."""
        check_signal(signal)
        if not self._caller.ended.done():
            self._caller.command(Kill(signal=signal))

    async def kill_all(self) -> None:
        """Kill everything that the command started, and wait for its end. Raises SandboxLostError.

        After the command's end, what it left behind is killed, and dies without being waited for.
        """
        if self._caller.ended.done():
            # This call is over: a new one. There is nothing to kill where the sandbox or the command is not known.
            with contextlib.suppress(UsageError, SandboxStateError):
                await self._kill_left()
            return
        self._caller.command(Kill(signal=signals.SIGKILL, all=True))
        for inlet in self._caller.outputs.values():
            inlet.discard()
        await self._ended()

    async def resize(self, rows: int, cols: int) -> None:
        """Change the size of the command's terminal; who came last decides. Raises UsageError for an impossible one."""
        size = pty_size(rows, cols)
        if not self._caller.ended.done():
            self._caller.command(Resize(rows=size.rows, cols=size.cols))

    async def wait(self) -> ExecResult:
        """Wait until the command has ended; of the main one, until its sandbox has.

        Raises SandboxLostError when the sandbox, or the supervisor, ended before it.
        """
        ended = await self._ended()
        if ended.error is not None:
            raise ended.error.to_error()
        return ExecResult(
            exit_code=ended.exit_code,
            signal=ended.signal,
            timed_out=ended.timed_out,
            usage=None if ended.usage is None else msgspec.convert(ended.usage, ExecUsage),
            id=self.number,
        )

    async def detach(self) -> None:
        """Leave the command running. Idempotent."""
        self._caller.close()

    def _take(self, notice: Notice) -> None:
        self._skipped += notice.skipped

    async def _ended(self) -> Ended:
        ended = await self._caller.wait_ended()
        if ended.running:
            raise SandboxLostError(f"wait for {self.command!r}", "only its past was asked for")
        return ended

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.detach()
