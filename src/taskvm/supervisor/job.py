"""A command that runs in a sandbox of the supervisor, and the clients that are attached to it, if any.

Its output goes to tapes, so it runs on when nobody reads; each client follows them from a place of its own.
Input may come from any of them.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import asdict

from taskvm.errors import SandboxLostError, TaskvmError
from taskvm.port import StreamReset
from taskvm.process import ByteStream, ExecResult, Process
from taskvm.supervisor.ports import ClientGoneError, Service
from taskvm.supervisor.tape import Tape
from taskvm.wire.supervision import Ended, ExecStatus, Kill, Launch, Notice, Refusal, Resize


class Job:
    """One command, from its start until the supervisor forgets it. `run` must run."""

    def __init__(self, number: int, process: Process, launch: Launch) -> None:
        self.number = number
        self.command: str = process.command
        self.tapes: dict[int, Tape] = {1: Tape(), 2: Tape()}
        self.pty: bool = launch.pty is not None
        self.attached: int = 0
        self.ended: asyncio.Event = asyncio.Event()
        self.ending: Ended | None = None
        self.cut_short: TaskvmError | None = None  # why its sandbox ends before it
        self.process = process
        self._size = launch.pty
        self._timeout_s = launch.timeout_s
        self._typed = 0
        self._started_s = time.monotonic()

    async def run(self) -> None:
        """Keep what the command says until it has ended, then how."""
        lost: TaskvmError = SandboxLostError(f"run {self.command!r}", "its sandbox was closed")
        try:
            self.ending = await self._watch()
        except TaskvmError as error:
            lost = error
        finally:
            if self.ending is None:
                self.ending = Ended(exit_code=125, error=Refusal.of(self.cut_short or lost))
            for tape in self.tapes.values():
                tape.end()
            self.ended.set()

    @property
    def running(self) -> bool:
        return self.ending is None

    @property
    def moved(self) -> int:
        """A number that grows with every byte in and out."""
        return self._typed + sum(tape.moved for tape in self.tapes.values())

    def status(self, *, main: bool) -> ExecStatus:
        """Return what `taskvm ps` tells of it."""
        return ExecStatus(
            number=self.number,
            command=self.command,
            pty=self.pty,
            age_s=time.monotonic() - self._started_s,
            attached=self.attached,
            main=main,
            exit_code=None if self.ending is None else self.ending.exit_code,
        )

    async def attach(self, service: Service, *, lossless: bool, follow: bool = True) -> None:
        """Let a client have the command until that has ended, or the client has left."""
        self.attached += 1
        try:
            async with asyncio.TaskGroup() as group:
                endless = [
                    group.create_task(self._feed(service)),
                    group.create_task(self._obey(service)),
                ]
                async with asyncio.TaskGroup() as outputs:
                    for channel in self.tapes:
                        outputs.create_task(self._send(service, channel, lossless, follow))
                if follow:
                    await self.ended.wait()
                for task in endless:
                    task.cancel()
        except* ClientGoneError:
            pass  # the command goes on
        finally:
            self.attached -= 1

    async def resize(self, rows: int, cols: int) -> None:
        """Give its terminal this size."""
        self._size = (rows, cols)
        with suppress(SandboxLostError):
            await self.process.resize(rows, cols)

    async def redraw(self, rows: int, cols: int) -> None:
        """Give its terminal the size of a client that has just come, whose screen is empty."""
        if self._size == (rows, cols):
            # The kernel sends SIGWINCH, on which full-screen programs paint themselves, for a new size only.
            await self.resize(rows + 1, cols)
        await self.resize(rows, cols)

    # The command.

    async def _watch(self) -> Ended:
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                return _ended(await self._follow())
        except TimeoutError:
            if not deadline.expired():
                raise
            await self.process.kill_all()
            return _ended(await self.process.wait(), timed_out=True)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the sandbox is lost: both streams say so

    async def _follow(self) -> ExecResult:
        async with asyncio.TaskGroup() as group:
            group.create_task(_record(self.process.stdout, self.tapes[1]))
            group.create_task(_record(self.process.stderr, self.tapes[2]))
        return await self.process.wait()

    # A client.

    async def _send(self, service: Service, channel: int, lossless: bool, follow: bool) -> None:
        outlet = service.outputs[channel]
        with self.tapes[channel].reader(lossless=lossless) as reader:
            while True:
                piece = await reader.read(follow=follow)
                if piece.skipped:
                    service.notify(Notice(channel=channel, skipped=piece.skipped))
                if not piece.data:
                    break
                await outlet.write(piece.data)
        outlet.end()

    async def _feed(self, service: Service) -> None:
        try:
            while data := await service.input.read():
                self._typed += len(data)
                await self.process.write(data)
            await self.process.close_stdin()
        except ClientGoneError:
            raise
        except (OSError, SandboxLostError, StreamReset):
            return  # the command reads no more

    async def _obey(self, service: Service) -> None:
        while True:
            match await service.next_command():
                case Resize(rows=rows, cols=cols):
                    with suppress(TaskvmError):  # a size that no terminal has
                        await self.resize(rows, cols)
                case Kill(all=True):
                    with suppress(SandboxLostError):
                        await self.process.kill_all()
                case Kill(signal=number):
                    with suppress(SandboxLostError):
                        await self.process.kill(number)


async def _record(stream: ByteStream, tape: Tape) -> None:
    try:
        async for data in stream:
            await tape.write(data)
    finally:
        tape.end()


def _ended(result: ExecResult, *, timed_out: bool = False) -> Ended:
    return Ended(
        exit_code=result.exit_code,
        signal=result.signal,
        timed_out=timed_out,
        usage=None if result.usage is None else asdict(result.usage),
    )
