"""The operations on the host itself: what tools use when the sandbox is off. It protects nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from taskfactory.agents.operations import Ending, Entry, EntryKind, OutputSink
from taskfactory.errors import OperationError
from taskfactory.taskfile import replace_file

_T = TypeVar("_T")
_CHUNK = 64 * 1024
# A killed process group is gone at once; a process in uninterruptible sleep, or of a busy host, may take longer.
_KILL_WAIT_S = 30.0
# A pipe holds 64 KiB: what the process wrote before its end is read in a fraction of this.
_DRAIN_S = 0.05


class HostOperations:
    """Acts on the host as the user who runs this program. `env` is the commands' whole environment."""

    def __init__(self, env: dict[str, str] | None = None) -> None:
        self._env = dict(os.environ) if env is None else env

    async def read_bytes(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        def read() -> bytes:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(-1 if length is None else length)

        return await _in_thread(f"read {path}", read)

    async def write_bytes(self, path: str, data: bytes) -> None:
        def write() -> None:
            target = Path(path).resolve()  # a link stays a link
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, data)

        await _in_thread(f"write {path}", write)

    async def stat(self, path: str) -> Entry:
        def look() -> Entry:
            status = Path(path).stat()
            return Entry(name=Path(path).name, kind=_kind(status.st_mode), size=status.st_size)

        return await _in_thread(f"stat {path}", look)

    async def list(self, path: str) -> Sequence[Entry]:
        def look() -> list[Entry]:
            with os.scandir(path) as entries:
                return [
                    Entry(name=entry.name, kind=_kind(status.st_mode), size=status.st_size)
                    for entry in entries
                    for status in (entry.stat(follow_symlinks=False),)
                ]

        return await _in_thread(f"list {path}", look)

    async def mkdir(self, path: str) -> None:
        def make() -> None:
            Path(path).mkdir(parents=True, exist_ok=True)

        await _in_thread(f"make the directory {path}", make)

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        cwd: str,
        on_output: OutputSink,
        timeout_s: float | None = None,
    ) -> Ending:
        argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
        source, sink = os.pipe()
        try:
            process = await _start(argv, cwd, self._env, sink)
        except BaseException:
            os.close(source)
            raise
        finally:
            os.close(sink)
        return await _follow(process, source, on_output, timeout_s)


async def _start(
    argv: Sequence[str], cwd: str, env: dict[str, str], sink: int
) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *argv,
            cwd=cwd,
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,  # one group to kill
        )
    except OSError as error:
        raise _refused(f"run {argv[0]} in {cwd}", error) from error
    except ValueError as error:
        raise OperationError(f"run {argv[0]}", str(error)) from error  # a NUL in an argument


async def _follow(
    process: asyncio.subprocess.Process,
    source: int,
    on_output: OutputSink,
    timeout_s: float | None,
) -> Ending:
    reader = asyncio.StreamReader()
    pipe = os.fdopen(source, "rb", buffering=0)
    transport: asyncio.ReadTransport | None = None
    try:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
            ending = group.create_task(_close_after(process, transport))
            while data := await reader.read(_CHUNK):
                if not on_output(data):
                    ending.cancel()
                    return Ending(exit_code=128 + signal.SIGKILL, stopped=True)
        code = await process.wait()
    except TimeoutError:
        # A program that stood still finds the output and its limit together: it was written in time.
        if transport is not None:
            transport.close()
            while data := await reader.read(_CHUNK):
                on_output(data)
        return Ending(exit_code=128 + signal.SIGKILL, timed_out=True)
    finally:
        (pipe if transport is None else transport).close()
        if process.returncode is None:
            await _kill_group(process)
    return Ending(exit_code=128 - code if code < 0 else code)


async def _close_after(
    process: asyncio.subprocess.Process, transport: asyncio.ReadTransport
) -> None:
    """End the output soon after the main process: a child that lives on may hold the pipe forever."""
    await process.wait()
    await asyncio.sleep(_DRAIN_S)
    transport.close()


async def _kill_group(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(_KILL_WAIT_S):
            await process.wait()
    except TimeoutError as error:
        cause = f"process {process.pid} is still there {_KILL_WAIT_S:.0f} s after SIGKILL: it waits for a device"
        raise OperationError("end a command", cause, errno.ETIMEDOUT) from error


async def _in_thread(operation: str, work: Callable[[], _T]) -> _T:
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        raise _refused(operation, error) from error


def _refused(operation: str, error: OSError) -> OperationError:
    return OperationError(operation, error.strerror or str(error), error.errno or 0)


def _kind(mode: int) -> EntryKind:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "dir"
    return "symlink" if stat.S_ISLNK(mode) else "other"
