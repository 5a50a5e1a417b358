"""taskvm.supervisor.server: the process's own manners, over its real socket, without a virtual machine."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from tests.support.waiting import PATIENCE_S, until

import taskvm
from taskvm.errors import HostError, UsageError
from taskvm.supervisor.client import Supervisor
from taskvm.supervisor.holding import Holding, Recipe
from taskvm.supervisor.place import Place
from taskvm.supervisor.server import Server
from taskvm.supervisor.spawn import spawn
from taskvm.wire.frames import FrameType, encode_frame
from taskvm.wire.supervision import StartRequest, encode


def no_recipe(request: StartRequest, on_progress: Callable[[str], None]) -> Recipe:
    if request.options:
        raise RuntimeError("canary-55 is in this bug's text")
    raise UsageError("start", "this test starts none")


@asynccontextmanager
async def serving(
    place: Path, *, version: str = taskvm.__version__, linger_s: float = 60
) -> AsyncIterator[Server]:
    server = Server(Place(place), no_recipe, version, linger_s)
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(server.run(ready.set))
        await ready.wait()
        yield server
        if not running.done():
            await server.shut_down()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / ("deep" * 30)  # longer than a socket's name may be
    monkeypatch.setenv("TASKVM_RUNTIME", str(directory))
    directory.mkdir(mode=0o700)
    return directory


async def _connect(place: Path) -> socket.socket:
    sock = Place(place).connect()
    assert sock is not None
    return sock


async def test_a_supervisor_of_another_version_says_so_and_can_be_ended(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing but its status and its end is asked of it."""
    async with serving(place, version="0.0.1"):
        supervisor = Supervisor()

        with pytest.raises(HostError, match=r"version 0\.0\.1 .*taskvm supervisor stop"):
            await supervisor.list()
        status = await supervisor.status()
        assert status is not None
        assert (status.version, status.sandboxes) == ("0.0.1", 0)
        assert await supervisor.shut_down()
    assert "no command can reach" not in caplog.text


async def test_clients_that_say_nothing_or_nonsense_stop_nobody(place: Path) -> None:
    """Silence, half a frame, noise, and a client that never reads."""
    request = encode_frame(FrameType.OPEN, 0, 1, encode({"op": "list"}))
    async with serving(place):
        loop, socks = asyncio.get_running_loop(), []
        for said in [b"", request[:7], b"\xff" * 100, request, request * 2] * 10:
            socks.append(await _connect(place))
            await loop.sock_sendall(socks[-1], said)

        async with asyncio.timeout(PATIENCE_S):
            assert await Supervisor().list() == []
        for sock in socks:
            sock.close()


async def test_more_clients_than_it_serves_are_hung_up_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are served go on, and places that are left are given to others."""
    monkeypatch.setattr("taskvm.supervisor.server.MAX_CONNECTIONS", 3)
    async with serving(place) as server:
        loop = asyncio.get_running_loop()
        socks = [await _connect(place) for _ in range(4)]
        greetings = [await loop.sock_recv(sock, 1) for sock in socks]

        assert [len(greeting) for greeting in greetings] == [1, 1, 1, 0]
        for sock in socks:
            sock.close()
        await until(lambda: not server._serving)
        with await _connect(place) as sock:
            assert len(await loop.sock_recv(sock, 1)) == 1


async def test_an_error_is_the_clients_and_a_bug_is_the_logs(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug's text may hold anything: the client is told where it is written down."""
    async with serving(place):
        with pytest.raises(UsageError, match="this test starts none"):
            await Supervisor().start({})
        with pytest.raises(HostError, match=r"failed unexpectedly.*/log") as caught:
            await Supervisor().start({"memory": 1})
        assert await Supervisor().list() == []

    assert "canary" not in str(caught.value)
    assert "start failed" in caplog.text


async def test_what_it_does_not_know_is_refused(place: Path) -> None:
    async with serving(place):
        for message in ({"op": "nosuch"}, {"op": "stop"}, {"op": "list", "more": 1}):
            sock = await _connect(place)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, encode_frame(FrameType.OPEN, 0, 1, encode(message)))
            said = b""
            while data := await loop.sock_recv(sock, 65536):
                said += data
            assert b"UsageError" in said
            sock.close()


class Slow:
    """What a sandbox is to its end: one that takes long."""

    def __init__(self) -> None:
        self.vm = SimpleNamespace(id="sandbox-slow")
        self.ended_s = 0.0
        self.outcome = ""
        self.ended = asyncio.Event()

    @property
    def running(self) -> bool:
        return not self.outcome

    def end(self, outcome: str) -> None:
        self.outcome = outcome


async def test_it_ends_though_who_asked_for_it_waits_no_longer(place: Path) -> None:
    """Ctrl-C at `taskvm supervisor stop` while sandboxes end: one that cannot be reached would keep the lock."""
    slow = Slow()
    async with asyncio.TaskGroup() as group:
        server = Server(Place(place), no_recipe, taskvm.__version__, linger_s=1e6)
        ready = asyncio.Event()
        running = group.create_task(server.run(ready.set))
        await ready.wait()
        server.roster._holdings["sandbox-slow"] = cast("Holding", slow)
        stopping = group.create_task(Supervisor().shut_down())
        await until(lambda: slow.outcome)
        stopping.cancel()
        await until(lambda: not server._serving)
        slow.ended.set()
        await until(running.done)

    assert not (place / "socket").exists()


async def test_it_ends_when_it_has_held_nothing_for_a_while(place: Path) -> None:
    """Its socket is gone, and who asks is told that none runs."""
    async with serving(place, linger_s=0.1):
        async with asyncio.timeout(PATIENCE_S):
            while (place / "socket").exists():
                await asyncio.sleep(0.05)

        with pytest.raises(UsageError, match="no sandbox runs"):
            await Supervisor().stop("x")
        assert await Supervisor().list() == []
        assert await Supervisor().status() is None


async def test_it_ends_when_its_place_is_taken_away(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache that was wiped: no command could find it, and another supervisor may be there."""
    caplog.set_level("INFO")
    async with serving(place):
        (place / "socket").rename(place / "old")
        (place / "socket").touch()
        async with asyncio.timeout(PATIENCE_S):
            while "supervisor ended" not in caplog.text:
                await asyncio.sleep(0.05)
    assert "no command can reach" in caplog.text
    assert (place / "socket").exists()


async def test_a_start_that_is_cancelled_passes_on_the_lock_and_nothing_else(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number would be another file's, and the supervisor one that holds no lock."""
    begun, cancelled, passed = threading.Event(), threading.Event(), []

    def run(_command: list[str], *, pass_fds: tuple[int, int], **_: object) -> None:
        begun.set()
        cancelled.wait(PATIENCE_S)
        lock = Path(f"/proc/self/fd/{pass_fds[0]}")
        passed.append(lock.readlink() if lock.is_symlink() else None)

    monkeypatch.setattr("taskvm.supervisor.spawn.subprocess.run", run)
    starting = asyncio.get_running_loop().create_task(spawn(Place(place)))
    await until(begun.is_set)
    starting.cancel()
    await asyncio.sleep(0)
    cancelled.set()
    await asyncio.wait([starting])
    await until(lambda: passed)

    assert starting.cancelled()
    assert passed == [place / "lock"]


async def test_a_second_one_cannot_be_started(place: Path) -> None:
    """The lock is the first one's for as long as it lives."""
    first = Place(place).lock()

    assert first is not None
    assert Place(place).lock() is None


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o755, 0o701])
def test_a_directory_that_others_may_enter_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """Nor is it changed: it may be the user's for something else."""
    tmp_path.chmod(mode)
    monkeypatch.setenv("TASKVM_RUNTIME", str(tmp_path))

    with pytest.raises(HostError, match="may (write to|enter) it"):
        Place.of_user()
    assert tmp_path.stat().st_mode & 0o777 == mode
