"""A sandbox that the supervisor holds: its commands, its limits, and how it ended.

Its end has one way, `end`, whoever wants it: a client, the main command's end, a limit, a lost guest, the
supervisor's own end. It runs to completion in a task of its own, so no client that leaves can interrupt it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from taskvm.background import Background
from taskvm.errors import GuestError, SandboxError, SandboxLostError, UsageError
from taskvm.net.ingress import Forward
from taskvm.opening import Opening
from taskvm.process import Process
from taskvm.sandbox import Sandbox
from taskvm.supervisor.idleness import Idleness, Look
from taskvm.supervisor.job import Job
from taskvm.usage import Statistics, glance
from taskvm.wire.supervision import Launch, SandboxState, SandboxStatus

# Commands that run, and ended ones whose output is kept, of one sandbox: 512 KiB of output each.
MAX_RUNNING = 64
MAX_ENDED = 16
# Commands that ended before those and have left something behind, to be killed by their numbers. What makes more is
# no longer known by all of them: a guest could say of each that something of it runs.
MAX_LEFT = 256
# The guest's agent removes the control group of a command when the last process of it has ended.
EXEC_GROUPS = "/sys/fs/cgroup/exec"
_logger = logging.getLogger(__name__)

# How late the end of a guest, or of its idle time, may be noticed.
TICK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A sandbox to be started, and what the supervisor itself needs to know of it. `ports`: (host port, guest port)."""

    starting: Opening[Sandbox]
    image: str | None = None
    idle_timeout_s: float | None = None
    max_duration_s: float | None = None
    ports: list[tuple[int, int]] = field(default_factory=list)


class Holding:
    """One sandbox. Make one with `start`; `ended` is set when all is released."""

    def __init__(self, vm: Sandbox, recipe: Recipe, name: str | None) -> None:
        self.vm = vm
        self.name = name
        self.jobs: dict[int, Job] = {}
        self.main: Job | None = None
        self._left: dict[int, Process] = {}
        self.outcome: str = ""
        self.ended: asyncio.Event = asyncio.Event()
        self.ended_s: float = 0.0
        self._recipe = recipe
        self._forwards: list[Forward] = []
        self._requests = 0
        self._launching = 0
        self._used = 0
        self._started_s = time.monotonic()
        self._idle_s = 0.0
        self._last: Statistics | None = None
        self._background = Background(self._fail)

    @classmethod
    async def start(cls, recipe: Recipe, name: str | None, launch: Launch | None) -> Holding:
        """Start the sandbox, and its main command. Nothing is left behind when that fails, or is cancelled."""
        holding = cls(await recipe.starting, recipe, name)
        try:
            for host_port, guest_port in recipe.ports:
                await holding.publish(guest_port, host_port)
            if launch is not None:
                holding.main = await holding.launch(launch)
        except BaseException:
            await holding._release()
            raise
        holding._background.start(holding._watch(), f"watch over {holding.vm.id}")
        if holding.main is not None:
            holding._background.start(holding._end_with(holding.main), f"end of {holding.vm.id}")
        return holding

    @property
    def running(self) -> bool:
        """Whether it has not ended, nor begun to."""
        return not self.outcome

    async def launch(self, launch: Launch) -> Job:
        """Start a command. Raises as `Sandbox.spawn`, and UsageError when too many run."""
        running = [job for job in self.jobs.values() if job.running]
        if len(running) + self._launching >= MAX_RUNNING:
            raise UsageError(
                f"run a command in {self.vm.id}", f"{MAX_RUNNING} run in it already", "Stop one"
            )
        self._launching += 1
        try:
            process = await self.vm.spawn(
                launch.command,
                cwd=launch.cwd,
                env=launch.env,
                pty=launch.pty,
                user=launch.user,
                limits=launch.limits,
            )
        finally:
            self._launching -= 1
        if not launch.stdin:
            await process.close_stdin()
        self._used += 1
        # The record's `exec` has the same number.
        job = self.jobs[process.id] = Job(process.id, process, launch)
        self._background.start(job.run(), f"command {job.number} of {self.vm.id}")
        self._forget_old()
        return job

    async def publish(self, port: int, host_port: int) -> str:
        """Make a server of the guest reachable, for as long as the sandbox lives; return its address on this host."""
        forward = await self.vm.forward(port, host_port=host_port)
        self._forwards.append(forward)
        return str(forward)

    async def kill(self, number: int, signal: int | None) -> None:
        """Send `signal` to a command that runs; None: end everything that it started, also after its own end.

        Raises UsageError when there is no such command, or it has ended.
        """
        if signal is None and number in self._left:
            await self._left[number].kill_all()
            return
        job = self.find(number, "kill a command of")
        if signal is None:
            await job.process.kill_all()
        elif job.running:
            await job.process.kill(signal)
        else:
            raise UsageError(
                f"kill command {number} of {self.name or self.vm.id}",
                "it has ended",
                f"What it left running ends by: taskvm kill --all {self.name or self.vm.id} {number}",
            )

    def find(self, number: int | None, operation: str = "attach to") -> Job:
        """Return the command of that number; without one the main command, or else the last that runs.

        Raises UsageError, with the words of `operation`.
        """
        if number is None:
            running = [each for each in self.jobs.values() if each.running]
            last = (running or [*self.jobs.values()])[-1:]
            job = self.main or (last[0] if last else None)
        else:
            job = self.jobs.get(number)
        if job is None:
            raise UsageError(
                f"{operation} {self.name or self.vm.id}",
                "nothing runs in it" if number is None else f"it has no command {number}",
                f"Start one: `taskvm exec -it {self.name or self.vm.id} -- bash`"
                if number is None
                else "`taskvm ps` has the numbers of those that run",
            )
        return job

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Count a request as activity while it is served, however short."""
        self._requests += 1
        self._used += 1
        try:
            yield
        finally:
            self._requests -= 1

    def status(self) -> SandboxStatus:
        """Return what it is and what it uses of the host now."""
        if self.running:
            with contextlib.suppress(SandboxError):
                self._last = self.vm.statistics()
        used = self._last
        age_s = (self.ended_s or time.monotonic()) - self._started_s
        return SandboxStatus(
            id=self.vm.id,
            name=self.name,
            image=self._recipe.image,
            state=self._state(),
            age_s=age_s,
            cpu_s=used.cpu_s if used else 0.0,
            memory_bytes=used.proportional_bytes if used and self.running else 0,
            disk_bytes=used.disk_bytes if used and self.running else 0,
            connections=used.open_connections if used and self.running else 0,
            idle_left_s=_left(self._recipe.idle_timeout_s, self._idle_s),
            life_left_s=_left(self._recipe.max_duration_s, age_s),
            forwards={str(forward): forward.guest_port for forward in self._forwards},
            execs=[job.status(main=job is self.main) for job in self.jobs.values()],
            outcome=self.outcome,
        )

    def end(self, outcome: str) -> None:
        """Begin to end it; `ended` is set when all is released. What comes first is the outcome."""
        if self.outcome:
            return
        self.outcome = outcome
        _logger.info("%s ends: %s", self.vm.id, outcome)
        self.ended_s = time.monotonic()
        for job in self.jobs.values():
            job.cut_short = SandboxLostError(f"run {job.command!r} in {self.vm.id}", outcome)
        self._background.start(self._release(), f"release of {self.vm.id}")

    # How.

    def _state(self) -> SandboxState:
        if not self.running:
            return "ended"
        return "paused" if self._last and self._last.paused else "running"

    async def _release(self) -> None:
        try:
            await self.vm.close()  # its commands end with it, and say so to their clients
            await self._background.aclose()
        finally:
            self.ended.set()

    async def _end_with(self, main: Job) -> None:
        await main.ended.wait()
        assert main.ending is not None, "it has ended"
        if main.ending.error is not None:
            self.end(main.ending.error.cause)
        elif main.ending.timed_out:
            self.end("its command was killed at its timeout")
        else:
            self.end(f"its command ended with {main.ending.exit_code}")

    async def _watch(self) -> None:
        idleness = Idleness(self._look())
        while self.running:
            await asyncio.sleep(TICK_S)
            if self.vm.state == "lost":
                self.end(_reason(self.vm))
            elif (limit_s := self._recipe.idle_timeout_s) is not None:
                self._idle_s = idleness.idle_s(self._look())
                if self._idle_s >= limit_s:
                    self.end(f"nothing happened in it for {limit_s:g} s")

    def _look(self) -> Look:
        seen = glance(self.vm._guest)
        attached = sum(job.attached for job in self.jobs.values())
        # What is shorter than a tick shows in what it has moved.
        moved = self._used + seen.moved + sum(job.moved for job in self.jobs.values())
        return Look(
            now_s=time.monotonic(),
            moved=moved,
            busy=bool(attached or self._requests or seen.open_connections),
            cpu_s=seen.cpu_s,
        )

    def _forget_old(self) -> None:
        old = [job for job in self.jobs.values() if not (job.running or job is self.main)]
        for job in old[: max(0, len(old) - MAX_ENDED)]:
            self._used += job.moved
            del self.jobs[job.number]
            self._left[job.number] = job.process
            self._background.start(self._release_handle(job.number), f"handle {job.number}")
        while len(self._left) > MAX_LEFT:
            del self._left[next(iter(self._left))]

    async def _release_handle(self, number: int) -> None:
        """Forget the handle of a command of which nothing runs."""
        with contextlib.suppress(SandboxError):  # it goes with its sandbox
            try:
                await self.vm.files.stat(f"{EXEC_GROUPS}/{number}")
            except GuestError as error:
                if error.errno == errno.ENOENT:
                    self._left.pop(number, None)

    def _fail(self, error: BaseException) -> None:
        _logger.error("%s failed", self.vm.id, exc_info=error)
        self.end(f"the supervisor failed: {error}")


def _reason(vm: Sandbox) -> str:
    try:
        vm.statistics()
    except SandboxError as error:
        return error.cause
    return "it was lost"


def _left(limit_s: float | None, gone_s: float) -> float | None:
    return None if limit_s is None else max(0.0, limit_s - gone_s)
