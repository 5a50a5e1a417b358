"""taskvm.watch over a guest that the test plays: what is slow is waited for, and costs nobody a healthy sandbox."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
from tests.support.waiting import until

from taskvm import guest as guest_module
from taskvm import watch as watch_module
from taskvm.errors import GuestError, SandboxLostError
from taskvm.guest import Guest
from taskvm.limits import Limits
from taskvm.vm import control as control_module
from taskvm.vm.control import Control
from taskvm.watch import Watch
from taskvm.wire import control as messages
from taskvm.wire.frames import Frame, FrameDecoder, FrameType, encode_frame

PAUSE_S = 0.02


class SlowAgent:
    """Answers pings at once, and everything while `runs` is true; `sync` when the test lets it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.runs = True
        self.synced = asyncio.Event()
        self.asked: list[str] = []
        self._sock = sock

    async def serve(self) -> None:
        decoder = FrameDecoder()
        async with asyncio.TaskGroup() as group:
            while data := await asyncio.get_running_loop().sock_recv(self._sock, 65536):
                for frame in decoder.feed(data):
                    group.create_task(self._answer(frame))

    async def _answer(self, frame: Frame) -> None:
        if frame.type is not FrameType.OPEN:
            self.asked.append(frame.type.name)
            return
        operation = msgspec.msgpack.decode(frame.payload)["op"]
        self.asked.append(operation)
        await until(lambda: self.runs)
        if operation == "sync":
            await self.synced.wait()
        if operation == "read":  # the guest's own processes: none
            reply = {"size": 2, "mode": 0o444, "mtime_ns": 0}
            await self._send(FrameType.REPLY, frame.stream, msgspec.msgpack.encode(reply))
            await self._send(FrameType.DATA, frame.stream, b"0\n", 1)
            await self._send(FrameType.END, frame.stream, b"", 1)
        else:
            await self._send(FrameType.REPLY, frame.stream, msgspec.msgpack.encode({}))

    async def _send(self, kind: FrameType, stream: int, payload: bytes, channel: int = 0) -> None:
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(
                self._sock, encode_frame(kind, channel, stream, payload)
            )


class Machine:
    """Stops and continues the agent."""

    def __init__(self, agent: SlowAgent) -> None:
        self.stops = 0
        self._agent = agent

    async def execute(self, command: str) -> None:
        self._agent.runs = command != "stop"
        self.stops += command == "stop"


class Stage:
    """A watched guest that is nothing but its agent."""

    def __init__(self, control: Control, agent: SlowAgent) -> None:
        self.agent = agent
        self.machine = Machine(agent)
        self.control = control
        self.lost: list[Exception] = []
        control.on_lost = self.lost.append
        self.guest = cast(
            "Guest",
            SimpleNamespace(
                id="sandbox-test",
                control=control,
                machine=self.machine,
                flushes=True,
                flush=self._flush,
                rouse=self._rouse,
            ),
        )

    async def _flush(self) -> None:
        await Guest.flush(self.guest)

    async def _rouse(self) -> None:
        await self.machine.execute("cont")

    def watch(
        self,
        directory: Path,
        traffic: Callable[[], int] = lambda: 0,
        limits: Limits = Limits(idle_pause_s=PAUSE_S, free_disk_mib=0),  # noqa: B008 - a value
    ) -> Watch:
        return Watch(
            self.guest,
            limits,
            directory=directory,
            connections=lambda: 0,
            traffic=traffic,
        )


@contextlib.asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    ours, theirs = socket.socketpair()
    control = await Control.open(ours)
    agent = SlowAgent(theirs)
    with theirs:
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(agent.serve())
            try:
                yield Stage(control, agent)
            finally:
                control.close(SandboxLostError("test", "over"))
                serving.cancel()


async def test_a_mount_that_is_slow_to_be_written_costs_a_pause_and_not_the_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent answers pings, `sync` takes longer than its time: the guest goes on, and is paused when it is done."""
    monkeypatch.setattr(guest_module, "FLUSH_TIMEOUT_S", 0.05)
    monkeypatch.setattr(watch_module, "FLUSH_AGAIN_S", 0.05)
    async with stage() as scene, asyncio.TaskGroup() as group:
        watching = group.create_task(scene.watch(tmp_path).run())
        await until(lambda: scene.agent.asked.count("sync") == 2)
        before = list(scene.lost), scene.machine.stops
        scene.agent.synced.set()
        await until(lambda: scene.machine.stops == 1)
        watching.cancel()

    assert before == ([], 0)
    assert scene.lost == []
    assert scene.agent.asked[:4] == ["read", "sync", "RESET", "ping"]


async def test_a_request_does_not_wait_for_a_mount_that_is_written_before_a_pause(
    tmp_path: Path,
) -> None:
    """While `sync` runs others are answered, and the pause is given up."""
    async with stage() as scene, asyncio.TaskGroup() as group:
        watching = group.create_task(scene.watch(tmp_path).run())
        await until(lambda: "sync" in scene.agent.asked)
        await scene.control.request(messages.RemoveRequest(path=b"/x"), messages.Done, "remove /x")
        stops = scene.machine.stops
        scene.agent.synced.set()
        await until(lambda: scene.machine.stops)
        watching.cancel()

    assert stops == 0
    assert scene.agent.asked.count("sync") == 2


async def test_time_in_which_this_program_stood_still_is_no_idleness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour, with a limit of a minute: the mounts' thread has yet to see what the guest has written meanwhile."""
    loop, still_s, looks = asyncio.get_running_loop(), [0.0], [0]
    clock = loop.time
    limits = Limits(idle_pause_s=0, idle_timeout_s=60, free_disk_mib=0)
    monkeypatch.setattr(loop, "time", lambda: clock() + still_s[0])
    monkeypatch.setattr(watch_module, "TICK_S", PAUSE_S)

    def traffic() -> int:
        looks[0] += 1
        return 0

    async with stage() as scene, asyncio.TaskGroup() as group:
        watching = group.create_task(scene.watch(tmp_path, traffic, limits).run())
        await until(lambda: looks[0] > 1)
        still_s[0], seen = 3600, looks[0]
        await until(lambda: looks[0] > seen + 1 or watching.done())
        ended = watching.done()
        watching.cancel()

    assert not ended


async def test_a_guest_that_is_stopped_on_purpose_is_not_taken_for_dead() -> None:
    """What is asked of it meanwhile, and what looks after it, has its time when the machine runs again."""
    async with stage() as scene, asyncio.TaskGroup() as group:
        scene.control.port.hold()
        with scene.control.asleep(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(control_module, "REPLY_TIMEOUT_S", 0.05)
            patch.setattr(control_module, "PROBE_TIMEOUT_S", 0.05)
            await scene.machine.execute("stop")
            asking = group.create_task(_outcome(scene.control))
            probing = group.create_task(scene.control.probe("look after the guest"))
            await asyncio.wait([asking, probing], timeout=0.3)
            early = asking.done(), probing.done(), list(scene.lost)
            await scene.machine.execute("cont")
        scene.control.port.release()
        await probing
        error = await asking

    assert early == (False, False, [])
    assert error is None
    assert scene.lost == []
    assert sorted(scene.agent.asked) == ["ping", "remove"]


async def test_a_ping_leaves_a_port_that_is_held() -> None:
    """An agent at rest answers: what it was asked for and does not end is given up, without losing the guest."""
    async with stage() as scene:
        scene.control.port.hold()
        with pytest.raises(GuestError, match="the reply within"):
            await scene.control.request(
                messages.SyncRequest(), messages.Done, "write back", 0.05, urgent=True
            )
        scene.control.port.release()
        await until(lambda: "RESET" in scene.agent.asked)

    assert scene.agent.asked == ["sync", "RESET", "ping"]


async def _outcome(control: Control) -> Exception | None:
    try:
        await control.request(messages.RemoveRequest(path=b"/x"), messages.Done, "remove /x")
    except (GuestError, SandboxLostError) as error:
        return error
    return None
