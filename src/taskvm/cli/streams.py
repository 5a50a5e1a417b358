"""The user's standard streams and signals, while a program of the guest has them."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Coroutine
from typing import Any

from taskvm import ByteStream, HostError, Process, SandboxLostError
from taskvm.terminal import Terminal

STDIN, STDOUT, STDERR = range(3)


async def until_signal(work: Coroutine[Any, Any, int]) -> int:
    """Do the work; SIGTERM and SIGHUP cancel it as Ctrl-C does, so that the sandbox is released."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None, "this is a coroutine of asyncio.run"
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) ignores SIGHUP
            loop.add_signal_handler(number, end, number)
    try:
        return await work
    except asyncio.CancelledError:
        if not received:
            raise
        return 128 + received[0]


class NoReaderError(Exception):
    """Whoever read our output has gone, as `head` does when it has seen enough."""


async def relay(process: Process, terminal: Terminal | None) -> int:
    try:
        async with asyncio.TaskGroup() as group:
            endless = [group.create_task(_feed(process))]
            if terminal is not None:
                endless.append(group.create_task(terminal.follow(process.resize)))
            outputs = [
                group.create_task(_copy(process.stdout, STDOUT)),
                group.create_task(_copy(process.stderr, STDERR)),
            ]
            result = await process.wait()
            await asyncio.wait(outputs)
            for task in endless:
                task.cancel()
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # the others say the same, or follow from it
    return result.exit_code


async def _copy(stream: ByteStream, descriptor: int) -> None:
    async for data in stream:
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


async def _feed(process: Process) -> None:
    """Pass standard input on. Nothing is read ahead of what the guest takes."""
    read = _read_ready if _is_pollable(STDIN) else _read_file
    try:
        while data := await read(STDIN):
            await process.write(data)
        await process.close_stdin()
    except (OSError, SandboxLostError):
        return  # the process has ended, or reads no more


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
