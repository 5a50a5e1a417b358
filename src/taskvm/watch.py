"""The host's watch over one guest: ends it at a limit, and stops its virtual CPUs while nothing happens.

Everything is judged from what the host sees, and a look costs microseconds. Only whether a process still runs in the
background is the guest's own word: one that lies keeps its CPU, or is paused; its limits hold all the same.

Rule 1: a limit ends the sandbox even while a pause waits for a QEMU that does not answer: each has a task of its own.
Rule 2: while the guest is paused its control port holds all frames; they go out in order after the guest has the
        time of now, so no request ever meets an old clock, and none is lost when it comes while the guest is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from taskvm.errors import GuestError, HostError, SandboxLostError
from taskvm.limits import Limits
from taskvm.wire.control import ReadRequest, ReadStarted

if TYPE_CHECKING:
    from taskvm.guest import Guest

# How late activity, or the end of free disk space, may be noticed. 20 idle sandboxes look 20 times a second, about
# 30 microseconds each.
TICK_S = 1.0
# How often a guest that is asked for something must show that it is alive. A command without a time limit would wait
# for ever for one that is not. An idle guest is left alone.
HEARTBEAT_S = 10.0
# Every thread of every exec, those of its nested cgroups and of what outlived it included (cgroup-v2.rst, PID).
PROCESSES_FILE = b"/sys/fs/cgroup/exec/pids.current"
# A provider that did not take all that was written within FLUSH_TIMEOUT_S is given this much more.
FLUSH_AGAIN_S = 60.0
MAX_ANSWER = 64  # bytes; a guest's root may have mounted anything there


class Watch:
    """Watches `guest` while `run` runs. `connections` and `traffic` tell what its other ports see.

    `traffic` is a number that changes whenever a frame has moved on the ports of the network and the mounts.
    """

    def __init__(
        self,
        guest: Guest,
        limits: Limits,
        *,
        directory: Path,
        connections: Callable[[], int],
        traffic: Callable[[], int],
    ) -> None:
        self._guest = guest
        self._limits = limits
        self._directory = directory
        self._connections = connections
        self._traffic = traffic
        self._own_calls = 0
        self._own_traffic = 0
        self._last_seen = self.movement
        self._last_active_s = asyncio.get_running_loop().time()
        self._flush_again_s = 0.0
        self._wanted = asyncio.Event()
        self._pausing = asyncio.Lock()
        self._needed = 0
        self.paused: bool = False
        guest.control.port.on_held = self._wanted.set

    async def run(self) -> None:
        """Watch until a limit is reached, then raise the SandboxLostError that names it."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._limit_duration())
                group.create_task(self._limit_disk())
                group.create_task(self._look_for_idleness())
                group.create_task(self._look_for_silence())
        except BaseExceptionGroup as failures:
            first: BaseException = failures
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]  # the first: it cancelled the others
            raise first from None

    # Limits.

    async def _limit_duration(self) -> None:
        if (limit_s := self._limits.max_duration_s) is not None:
            await asyncio.sleep(limit_s)
            raise self._end(f"its life of max_duration_s={limit_s:g} is over")

    async def _limit_disk(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                check_free_space(self._directory, self._limits.free_disk_mib)
            except HostError as error:
                raise self._end(error.cause, error.next_step) from error

    async def _look_for_silence(self) -> None:
        """End a guest that has stopped answering while something waits for it."""
        control = self._guest.control
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if control.open_calls > 0:
                await control.probe(f"run the sandbox {self._guest.id}")

    def _end(self, cause: str, next_step: str = "") -> SandboxLostError:
        return SandboxLostError(f"run the sandbox {self._guest.id}", cause, next_step)

    # Idleness.

    async def _look_for_idleness(self) -> None:
        pause_s, timeout_s = self._limits.idle_pause_s, self._limits.idle_timeout_s
        spans = [span for span in (pause_s, timeout_s) if span]
        if not spans:
            return
        tick_s = min(TICK_S, *(span / 4 for span in spans))
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + tick_s
            await asyncio.sleep(tick_s)
            # While this program stood still nobody saw what the guest did: that time counts for nothing.
            self._last_active_s += loop.time() - due_s
            idle_s = self._idle_s()
            if timeout_s is not None and idle_s >= timeout_s:
                raise self._end(_nothing_happened(timeout_s))
            if pause_s and idle_s >= pause_s and await self._is_still() and await self._flush():
                await self._pause(timeout_s)

    def _idle_s(self) -> float:
        now_s = asyncio.get_running_loop().time()
        moved = self.movement
        if moved != self._last_seen or self._is_busy():
            self._last_seen, self._last_active_s = moved, now_s
        return now_s - self._last_active_s

    @property
    def movement(self) -> tuple[int, int]:
        """Two numbers that grow with use: calls of others than this watch, frames on network and mounts."""
        calls = self._guest.control.calls_made - self._own_calls
        return calls, self._traffic() - self._own_traffic

    def _is_busy(self) -> bool:
        return self._guest.control.open_calls > 0 or self._connections() > 0

    async def _is_still(self) -> bool:
        """Ask the guest whether no process runs in it but the agent's. A refusal is a no."""
        operation = "ask the guest for its processes"
        self._own_calls += 1
        request = ReadRequest(path=PROCESSES_FILE, length=MAX_ANSWER)
        call = self._guest.control.open_call(request, operation, (1,))
        try:
            await call.answer(ReadStarted)
            async with asyncio.timeout(TICK_S):
                return (await call.inlets[1].read(MAX_ANSWER)).strip() == b"0"
        except (GuestError, ConnectionError, TimeoutError):
            return False
        finally:
            call.forget()

    async def _pause(self, timeout_s: float | None) -> None:
        """Stop the virtual CPUs until a request comes, then let them run, with the time of now."""
        async with self._pausing:
            if not self._needed:
                await self._pause_now(timeout_s)

    @asynccontextmanager
    async def kept_awake(self) -> AsyncIterator[None]:
        """Wake the guest if it is paused, and pause it no more until the end."""
        self._needed += 1
        self._wanted.set()
        try:
            async with self._pausing:
                yield
        finally:
            self._needed -= 1

    async def _pause_now(self, timeout_s: float | None) -> None:
        port = self._guest.control.port
        self._wanted.clear()
        port.hold()
        try:
            # From here on no request reaches the guest; one that came before shows now, and is not overlooked.
            if not self._is_busy() and self.movement == self._last_seen:
                with self._guest.control.asleep():
                    await self._guest.machine.execute("stop")
                    self.paused = True
                    await self._wait_wanted(timeout_s)
                await self._guest.rouse()
                self.paused = False
                self._last_active_s = asyncio.get_running_loop().time()
        finally:
            port.release()

    async def _flush(self) -> bool:
        """Bring the mounts on the host up to date: a paused guest writes nothing back.

        Before the port is held, since a slow provider takes long, and requests must not wait for it. Returns whether
        that was done.
        """
        if not self._guest.flushes:
            return True
        now_s = asyncio.get_running_loop().time()
        if now_s < self._flush_again_s:
            return False
        self._own_calls += 1
        before = self._traffic()
        try:
            await self._guest.flush()
        except (GuestError, SandboxLostError):
            self._flush_again_s = now_s + FLUSH_AGAIN_S
            return False
        finally:
            self._own_traffic += self._traffic() - before
        return True

    async def _wait_wanted(self, timeout_s: float | None) -> None:
        seen = self._last_seen = self.movement
        while not self._wanted.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wanted.wait()
            if timeout_s is not None and self._idle_s() >= timeout_s:
                raise self._end(_nothing_happened(timeout_s))
            if self.movement != seen:  # a mount tells the guest of a change
                return


def _nothing_happened(timeout_s: float) -> str:
    return f"nothing happened in it for idle_timeout_s={timeout_s:g}"


def check_free_space(directory: Path, least_mib: int) -> None:
    """Raise HostError unless the disk of `directory` has `least_mib` MiB free for this user."""
    free_mib = shutil.disk_usage(directory).free >> 20
    if free_mib < least_mib:
        raise HostError(
            f"use the disk of {directory}",
            f"{free_mib} MiB are free, and free_disk_mib={least_mib} must remain",
            "Free disk space, or set TASKVM_CACHE to a directory on a larger disk",
        )
