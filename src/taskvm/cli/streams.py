"""The user's standard streams and signals, while a program of the guest has them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

import taskvm
from taskvm import HostError, SandboxLostError
from taskvm.cli.detach import DetachKeys
from taskvm.terminal import Terminal

STDIN, STDOUT, STDERR = range(3)
# Detach keys are typed as one: Ctrl-P alone is a shell's last command, and must not wait for the next key.
KEYS_TIMEOUT_S = 0.5


async def until_signal(
    work: Coroutine[Any, Any, int],
    *,
    numbers: Sequence[int] = (signal.SIGTERM, signal.SIGHUP),
    on_signal: Callable[[int], Awaitable[None]] | None = None,
) -> int:
    """Do the work; the signals cancel it as Ctrl-C does, so that the sandbox is released.

    `on_signal` is awaited when the work has been left so, with the signal.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None, "this is a coroutine of asyncio.run"
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        if on_signal is None or len(received) == 1:
            task.cancel()

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) ignores SIGHUP
            loop.add_signal_handler(number, end, number)
    try:
        return await work
    except asyncio.CancelledError:
        if not received:
            raise
        if on_signal is not None:
            await on_signal(received[0])
        return 128 + received[0]


class NoReaderError(Exception):
    """Whoever read our output has gone, as `head` does when it has seen enough."""


class DetachedError(Exception):
    """The user has typed the detach keys."""


class Program(Protocol):
    """What has the streams: a `Process`, or an `Attachment` to one."""

    stdout: taskvm.ByteStream
    stderr: taskvm.ByteStream

    async def write(self, data: bytes) -> None: ...
    async def close_stdin(self) -> None: ...
    async def resize(self, rows: int, cols: int) -> None: ...
    async def wait(self) -> taskvm.ExecResult: ...


async def relay(
    process: Program,
    terminal: Terminal | None,
    *,
    keys: DetachKeys | None = None,
    owns_input: bool = True,
    screen: asyncio.Lock | None = None,
) -> taskvm.ExecResult:
    """Give the standard streams to `process` until it ends. With `owns_input` their end is its input's end.

    `screen` is locked by who asks the user something on this terminal: output waits for it, and no key is for
    `process`. Raises DetachedError when `keys` are typed.
    """
    try:
        async with asyncio.TaskGroup() as group:
            endless = []
            if screen is None or not os.isatty(STDIN):
                endless.append(group.create_task(_feed(process, keys, owns_input)))
            else:
                await process.close_stdin()
            if terminal is not None:
                endless.append(group.create_task(terminal.follow(process.resize)))
            outputs = [
                group.create_task(copy_stream(process.stdout, STDOUT, screen)),
                group.create_task(copy_stream(process.stderr, STDERR, screen)),
            ]
            result = await process.wait()
            await asyncio.wait(outputs)
            for task in endless:
                task.cancel()
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # the others say the same, or follow from it
    return result


async def copy_stream(
    stream: taskvm.ByteStream, descriptor: int, screen: asyncio.Lock | None = None
) -> None:
    """Write what comes to one of the standard streams. Raises NoReaderError, HostError."""
    # A pipe that nobody reads must not keep a question from the terminal.
    shared = screen if screen is not None and os.isatty(descriptor) else contextlib.nullcontext()
    async for data in stream:
        async with shared:
            await asyncio.to_thread(_write_all, descriptor, data)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError as error:
        raise NoReaderError from error
    except OSError as error:
        raise HostError("write the command's output", error.strerror or str(error)) from error


def occupy_standard_streams() -> None:
    """Give /dev/null the number of a standard stream that is closed (`>&-`).

    The next file to be opened would get that number, and the guest's output would go there.
    """
    for descriptor in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


async def _feed(process: Program, keys: DetachKeys | None, owns_input: bool) -> None:
    """Pass standard input on. Nothing is read ahead of what the guest takes."""
    read = _read_ready if _is_pollable(STDIN) else _read_file
    try:
        while data := await _read_keys(read, keys, process):
            passed, detached = keys.feed(data) if keys else (data, False)
            await process.write(passed)
            if detached:
                raise DetachedError
        if owns_input:
            await process.close_stdin()
    except (OSError, SandboxLostError):
        return  # the process has ended, or reads no more


async def _read_keys(
    read: Callable[[int], Awaitable[bytes]], keys: DetachKeys | None, process: Program
) -> bytes:
    """Read standard input. Keys that are held back go to the command when no others follow."""
    if keys is not None and keys.holds:
        try:
            async with asyncio.timeout(KEYS_TIMEOUT_S):
                return await read(STDIN)
        except TimeoutError:
            await process.write(keys.release())
    return await read(STDIN)


def _is_pollable(descriptor: int) -> bool:
    """Regular files and some devices, such as /dev/null, are not (epoll_ctl(2), EPERM): they never block either."""
    with select.epoll() as poll:
        try:
            poll.register(descriptor)
        except OSError:
            return False
    return True


async def _read_ready(descriptor: int) -> bytes:
    # Not by an asyncio pipe: that would make a terminal non-blocking, and with it standard output.
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, 65536)


async def _read_file(descriptor: int) -> bytes:
    return await asyncio.to_thread(os.read, descriptor, 65536)


def terminal_environment(env: Iterable[str]) -> dict[str, str]:
    """Tell the guest which terminal this is, unless the user said another."""
    said = any(text.startswith("TERM=") for text in env)
    return {} if said or "TERM" not in os.environ else {"TERM": os.environ["TERM"]}
