"""Processes in the guest, for programs that block: what `Sandbox.spawn` of `taskvm.sync` hands out."""

from __future__ import annotations

import codecs
import signal as signals
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from taskvm import process as aio
from taskvm.sync.bridge import Bridge


class ByteStream:
    """One output stream of a guest process; read it or iterate over it. What is not read blocks only its writer."""

    def __init__(self, bridge: Bridge, stream: aio.ByteStream) -> None:
        self._bridge = bridge
        self._stream = stream

    def read(self, max_bytes: int = 65536) -> bytes:
        """Return 1 … `max_bytes` bytes, or b"" at the end. Raises SandboxLostError when the sandbox is gone."""
        return self._bridge.call(self._stream.read, max_bytes)

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read():
            yield data

    def text(self) -> Iterator[str]:
        """Iterate over the stream as UTF-8 text; a character cut by a chunk's end is held until it is whole."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for data in self:
            if text := decoder.decode(data):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class Process:
    """A running process of the guest. Leaving `with` ends it and everything it started.

    `id` is its number in this sandbox, which the audit record's `exec` repeats; `pid` is the guest's, used again.
    `stdout` and `stderr` are live; with `merge_output` standard error arrives in `stdout` and `stderr` is empty.
    Threads may share it: one may read while another writes.
    """

    def __init__(self, bridge: Bridge, process: aio.Process) -> None:
        self._bridge = bridge
        self._process = process
        self.command: str = process.command
        self.id: int = process.id
        self.pid: int = process.pid
        self.stdout: ByteStream = ByteStream(bridge, process.stdout)
        self.stderr: ByteStream = ByteStream(bridge, process.stderr)

    def __repr__(self) -> str:
        return repr(self._process)

    def write(self, data: bytes) -> None:
        """Write to standard input, waiting while the process does not read.

        Raises BrokenPipeError after `close_stdin` or the process's end.
        """
        self._bridge.call(self._process.write, data)

    def close_stdin(self) -> None:
        """Close standard input: the process reads end of file. Idempotent."""
        self._bridge.call(self._process.close_stdin)

    def kill(self, signal: int = signals.SIGTERM) -> None:
        """Send `signal` to the process's group. Nothing happens when it has ended."""
        self._bridge.call(self._process.kill, signal)

    def resize(self, rows: int, cols: int) -> None:
        """Change the size of the process's terminal: its foreground programs get SIGWINCH.

        Nothing happens without a terminal, or when the process has ended. Raises UsageError for an impossible size.
        """
        self._bridge.call(self._process.resize, rows, cols)

    def wait(self) -> aio.ExecResult:
        """Wait until the main process has ended. Its children may live on.

        Raises SandboxLostError; GuestError when the guest has dropped the process without saying how it ended.
        """
        return self._bridge.call(self._process.wait)

    def kill_all(self) -> None:
        """Kill everything that this exec started, double-forked daemons included (cgroup.kill), and wait for it.

        After the main process's end, what it left behind is killed, and dies without being waited for.
        Raises SandboxLostError when the guest does not comply within KILL_TIMEOUT_S.
        """
        self._bridge.call(self._process.kill_all)

    def abandon(self) -> None:
        """Tell the guest to kill everything this exec started, without waiting. Idempotent."""
        self._bridge.call(self._abandon)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bridge.release(self._abandon if error is not None else self._process.kill_all)

    async def _abandon(self) -> None:
        self._process.abandon()
