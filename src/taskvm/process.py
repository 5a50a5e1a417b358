"""Processes in the guest: what `Sandbox.exec` returns and what `Sandbox.spawn` hands out."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import signal as signals
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from taskvm.arguments import check_signal
from taskvm.errors import GuestError, SandboxLostError, UsageError
from taskvm.port import Inlet, StreamReset
from taskvm.resources import ExecUsage, usage_of
from taskvm.vm.control import Call
from taskvm.wire.control import Exited, PtySize, ResizeRequest, SignalRequest

# exec() keeps at most this much of each output stream and drops the rest; spawn() streams without a limit.
MAX_CAPTURED_BYTES = 64 * 1024 * 1024
# After cgroup.kill the agent reports the exit in tens of milliseconds; one that is starved of CPU by 50 neighbours took
# 14 s to answer at all (vm/control.py, PROBE_TIMEOUT_S).
KILL_TIMEOUT_S = 30.0
# Linux errno ECANCELED: the host no longer wants the exec.
_CANCELLED = 125
_IO_ERROR = 5  # EIO
_BROKEN_PIPE = 32  # EPIPE
# struct winsize holds 16 bits.
_MAX_PTY_SIDE = 65535
_SHOWN_BYTES = 200


def pty_size(rows: int, cols: int) -> PtySize:
    """Return the size of a terminal. Raises UsageError for one that the kernel has no number for."""
    if not (1 <= rows <= _MAX_PTY_SIDE and 1 <= cols <= _MAX_PTY_SIDE):
        raise UsageError(
            f"give a terminal {rows} rows and {cols} columns",
            f"each is 1 … {_MAX_PTY_SIDE}",
            "Pass (rows, cols), such as (24, 80)",
        )
    return PtySize(rows=rows, cols=cols)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """How a command in the guest ended, and what it wrote.

    `exit_code` is its exit status, or 128 + the signal that ended it, which is then in `signal`. `timed_out` says that
    `timeout_s` passed and everything it had started was killed. `truncated` says that more than
    MAX_CAPTURED_BYTES of a stream were written and the rest was dropped. `usage` is what it cost in the guest; None
    when it was over before it began. `id` is its number in this sandbox, which the audit record's `exec` repeats; 0
    when it did not begin.
    """

    exit_code: int
    signal: int | None = None
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    timed_out: bool = False
    truncated: bool = False
    usage: ExecUsage | None = None
    id: int = 0

    def __repr__(self) -> str:
        # A notebook prints it, and there may be 128 MiB.
        outputs = {"stdout": self.stdout_bytes, "stderr": self.stderr_bytes}
        shown = (f", {name}={_shortened(output)}" for name, output in outputs.items() if output)
        return f"<ExecResult {self.outcome}{''.join(shown)}>"

    @property
    def ok(self) -> bool:
        """Whether the command exited with 0."""
        return self.exit_code == 0

    @property
    def stdout(self) -> str:
        """Standard output as UTF-8; malformed bytes become U+FFFD."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Standard error as UTF-8; malformed bytes become U+FFFD."""
        return self.stderr_bytes.decode("utf-8", "replace")

    @property
    def outcome(self) -> str:
        """The ending in words: "exit code 1", "killed by SIGKILL", "timed out"."""
        if self.timed_out:
            return "timed out; everything it had started was killed"
        if self.usage is not None and self.usage.oom_kills:
            return f"{self._ending}; out of memory, the kernel killed {self.usage.oom_kills} of its processes"
        return self._ending

    @property
    def _ending(self) -> str:
        if self.signal is not None:
            try:
                return f"killed by {signals.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        return f"exit code {self.exit_code}"


def _shortened(output: bytes) -> str:
    more = len(output) - _SHOWN_BYTES
    return f"{output[:_SHOWN_BYTES]!r}{f' and {more} bytes more' if more > 0 else ''}"


class ByteStream:
    """One output stream of a guest process; read it or iterate over it. What is not read blocks only its writer."""

    def __init__(self, inlet: Inlet) -> None:
        self._inlet = inlet

    async def read(self, max_bytes: int = 65536) -> bytes:
        """Return 1 … `max_bytes` bytes, or b"" at the end. Raises SandboxLostError when the sandbox is gone."""
        # asyncio's StreamReader reads all for -1; here it would look like the end.
        if max_bytes < 1:
            operation = f"read {max_bytes} bytes of a command's output"
            raise UsageError(operation, "it must be at least 1", "Iterate over it to read all")
        try:
            return await self._inlet.read(max_bytes)
        except StreamReset:
            return b""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def text(self) -> AsyncIterator[str]:
        """Iterate over the stream as UTF-8 text; a character cut by a chunk's end is held until it is whole."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        async for data in self:
            if text := decoder.decode(data):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class Process:
    """A running process of the guest. Leaving `async with` ends it and everything it started.

    `id` is its number in this sandbox, which the audit record's `exec` repeats; `pid` is the guest's, used again.
    `stdout` and `stderr` are live; with `merge_output` or a terminal all output arrives in `stdout`.
    """

    def __init__(self, call: Call, command: str, pid: int) -> None:
        self._call = call
        self._exit: ExecResult | None = None
        self.command = command
        self.id: int = call.stream
        self.pid = pid
        self.stdout: ByteStream = ByteStream(call.inlets[1])
        self.stderr: ByteStream = ByteStream(call.inlets[2])

    def __repr__(self) -> str:
        state = "running" if self._exit is None else self._exit.outcome
        return f"<Process {self.id} {self.command!r} {state}>"

    async def write(self, data: bytes) -> None:
        """Write to standard input, waiting while the process does not read.

        Raises BrokenPipeError after `close_stdin` or the process's end.
        """
        try:
            await self._call.outlet.write(data)
        except StreamReset as error:
            raise BrokenPipeError(_BROKEN_PIPE, "the guest has dropped the process") from error

    async def close_stdin(self) -> None:
        """Close standard input: the process reads end of file. Idempotent.

        Into a terminal its end-of-file character is typed (Ctrl-D) when all before it has been read, and again
        whenever it has been, so that it is the end for every program that reads lines.
        """
        self._call.outlet.end()

    async def kill(self, signal: int = signals.SIGTERM) -> None:
        """Send `signal` to the process's group. Nothing happens when it has ended.

        Raises UsageError for what is no signal.
        """
        check_signal(signal)
        if self._exit is None and not self._call.exited.done():
            self._call.send_signal(SignalRequest(signal=signal, scope="group"))

    async def resize(self, rows: int, cols: int) -> None:
        """Change the size of the process's terminal: its foreground programs get SIGWINCH.

        Nothing happens without a terminal, or when the process has ended. Raises UsageError for an impossible size.
        """
        size = pty_size(rows, cols)
        if not self._call.exited.done():
            self._call.send_signal(ResizeRequest(rows=size.rows, cols=size.cols))

    async def wait(self) -> ExecResult:
        """Wait until the main process has ended. Its children may live on.

        Raises SandboxLostError; GuestError when the guest has dropped the process without saying how it ended.
        """
        if self._exit is None:
            try:
                exited = await asyncio.shield(self._call.exited)
            except StreamReset as error:
                raise GuestError(self._call.operation, error.errno or _IO_ERROR, "reset") from error
            self._exit = _result(exited, self.id)
        return self._exit

    async def kill_all(self) -> None:
        """Kill everything that this exec started, double-forked daemons included (cgroup.kill), and wait for it.

        After the main process's end, what it left behind is killed, and dies without being waited for.
        Raises SandboxLostError when the guest does not comply within KILL_TIMEOUT_S.
        """
        if self._call.exited.done():
            await self._kill_children()
            return
        self._signal_all()
        await self._call.wait_awake()
        for inlet in self._call.inlets.values():
            inlet.discard()
        # Not asyncio.timeout: after this program itself stood still, the end is there and counts.
        await asyncio.wait([self._call.exited], timeout=KILL_TIMEOUT_S)
        if not self._call.exited.done():
            raise SandboxLostError(
                f"kill {self.command!r} in the guest",
                f"it has not ended within {KILL_TIMEOUT_S:.0f} s",
                "Close the sandbox",
            )
        await self.wait()

    async def _kill_children(self) -> None:
        # The guest knows an exec by its stream's number until the last process of it has ended.
        try:
            self._signal_all()
            await self._call.settle()
        except SandboxLostError:
            return  # nothing of it runs any more

    def _signal_all(self) -> None:
        self._call.send_signal(SignalRequest(signal=signals.SIGKILL, scope="all"))

    def abandon(self) -> None:
        """Tell the guest to kill everything this exec started, without waiting. Idempotent."""
        if not self._call.exited.done():
            self._call.forget(errno=_CANCELLED)
            return
        with contextlib.suppress(SandboxLostError):  # then nothing of it runs any more
            self._signal_all()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.abandon()
        else:
            await self.kill_all()


class Capture:
    """Collects what a process writes, up to MAX_CAPTURED_BYTES of each stream."""

    def __init__(self) -> None:
        self.stdout: bytearray = bytearray()
        self.stderr: bytearray = bytearray()
        self.truncated: bool = False

    async def run(
        self, process: Process, stdin: str | bytes | AsyncIterator[bytes] | None
    ) -> ExecResult:
        """Feed `stdin`, read both streams to their end, and return the result. A source of input is left at the end."""
        async with asyncio.TaskGroup() as group:
            feeding = group.create_task(_feed(process, stdin))
            outputs = ((process.stdout, self.stdout), (process.stderr, self.stderr))
            await asyncio.wait([group.create_task(self._collect(*each)) for each in outputs])
            ending = await process.wait()
            feeding.cancel()  # it may wait for more input, which nobody reads
        return self.result(ending)

    def result(self, ending: ExecResult, *, timed_out: bool = False) -> ExecResult:
        """Return `ending` with the output collected so far."""
        return replace(
            ending,
            stdout_bytes=bytes(self.stdout),
            stderr_bytes=bytes(self.stderr),
            timed_out=timed_out,
            truncated=self.truncated,
        )

    async def _collect(self, stream: ByteStream, into: bytearray) -> None:
        while data := await stream.read(1024 * 1024):
            room = MAX_CAPTURED_BYTES - len(into)
            self.truncated = self.truncated or len(data) > room
            into += data[: max(room, 0)]


def _result(exited: Exited, number: int) -> ExecResult:
    usage = None if exited.usage is None else usage_of(exited.usage)
    code = exited.code or 0 if exited.signal is None else 128 + exited.signal
    return ExecResult(exit_code=code, signal=exited.signal, usage=usage, id=number)


async def _feed(process: Process, stdin: str | bytes | AsyncIterator[bytes] | None) -> None:
    async for data in _pieces(stdin):
        try:
            await process.write(data)
        except BrokenPipeError:
            return  # the process ended without reading all of it, as processes may
    await process.close_stdin()


async def _pieces(stdin: str | bytes | AsyncIterator[bytes] | None) -> AsyncIterator[bytes]:
    if isinstance(stdin, str | bytes):
        yield stdin.encode() if isinstance(stdin, str) else stdin
    elif stdin is not None:
        async for data in stdin:
            yield data
