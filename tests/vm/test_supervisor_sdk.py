"""The supervisor from a program: taskvm.supervisor.client, taskvm.sync.supervisor."""

import asyncio
from pathlib import Path

import pytest
from tests.support.waiting import PATIENCE_S, wait_until

from taskvm import ByteStream, Launch, SandboxLostError, Supervisor, UsageError, sync
from taskvm.supervisor.holding import MAX_ENDED

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("runtime")]
SMALL: dict[str, object] = {"cpus": 1, "memory": 256}


async def test_a_program_leaves_a_sandbox_and_finds_it_again(tmp_path: Path) -> None:
    """By another object, as another program would; files of the host are named from here."""
    (tmp_path / "in").write_text("hello\n")
    lines: list[str] = []
    started = await Supervisor().start(SMALL, name="sdk", on_progress=lines.append)
    supervisor = Supervisor()

    (found,) = await supervisor.list()
    await supervisor.copy_in("sdk", tmp_path / "in", "/tmp/in")
    async with await supervisor.exec("sdk", ["cat", "/tmp/in", "-"], env={"A": "b"}) as attached:
        await attached.write(b"typed\n")
        await attached.close_stdin()
        said = b"".join([data async for data in attached.stdout])
        result = await attached.wait()
    await supervisor.copy_out("sdk", "/tmp/in", tmp_path / "out")

    assert (found.id, found.name, found.state) == (started.id, "sdk", "running")
    assert (said, result.exit_code) == (b"hello\ntyped\n", 0)
    assert result.usage is not None
    assert result.usage.memory_peak_bytes > 0
    assert (tmp_path / "out").read_text() == "hello\n"
    assert (await supervisor.stop("sdk")).outcome == "it was stopped"
    assert await supervisor.list() == []


async def read_exactly(stream: ByteStream, count: int) -> bytes:
    """Return the next `count` bytes, or what there is up to the end."""
    data = b""
    while len(data) < count and (piece := await stream.read(count - len(data))):
        data += piece
    return data


async def test_input_comes_from_any_and_output_goes_to_all() -> None:
    """One that left is found again where the ring is; what it missed comes first."""
    supervisor = Supervisor()
    await supervisor.start(SMALL, name="two", launch=Launch(command=["cat"]))
    async with (
        await supervisor.attach("two") as first,
        await supervisor.attach("two") as second,
    ):
        await first.write(b"1\n")
        assert await read_exactly(second.stdout, 2) == b"1\n"
        await second.write(b"2\n")
        assert await read_exactly(first.stdout, 4) == b"1\n2\n"
    async with await supervisor.attach("two") as third:
        assert await read_exactly(third.stdout, 4) == b"1\n2\n"
        await third.close_stdin()
        assert (await third.wait()).exit_code == 0

    assert await supervisor.list() == []


async def test_a_slow_reader_of_a_terminal_misses_output_and_stops_nobody() -> None:
    """It is told how much; the other one, who reads, has the end at once."""
    supervisor = Supervisor()
    script = "read x; seq 200000 | cat; echo end"
    launch = Launch(command=["sh", "-c", script], pty=(24, 80))
    await supervisor.start(SMALL, name="slow", launch=launch)
    async with await supervisor.attach("slow") as slow, await supervisor.attach("slow") as quick:
        await quick.write(b"\n")
        seen = b""
        while b"end\r\n" not in seen[-20:]:
            seen += await quick.stdout.read()

        late = b"".join([data async for data in slow.stdout])

    assert late.endswith(b"200000\r\nend\r\n")
    assert slow.skipped > 0
    assert slow.skipped + len(late) == quick.skipped + len(seen)


async def test_a_path_that_is_relative_is_refused() -> None:
    """The supervisor's working directory is `/`: "." would be all of the host."""
    for options in ({"mounts": [".:/workspace"]}, {"audit": "log"}, {"mounts": [":/workspace"]}):
        with pytest.raises(UsageError, match="a path is relative"):
            await Supervisor().start({**SMALL, **options})


async def test_a_start_that_is_given_up_leaves_nothing() -> None:
    """A client that goes away in the middle of a start takes the sandbox with it."""
    supervisor = Supervisor()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await supervisor.start({**SMALL, "cold": True}, name="early")

    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await supervisor.start(SMALL, name="early", launch=Launch(command=["true"]))
            except UsageError:  # its name is taken until it is gone
                await asyncio.sleep(0.05)
            else:
                break


async def test_a_sandbox_that_ends_tells_those_who_wait() -> None:
    supervisor = Supervisor()
    await supervisor.start(SMALL, name="gone", launch=Launch(command=["sleep", "600"]))
    async with await supervisor.attach("gone") as attached, asyncio.TaskGroup() as group:
        group.create_task(supervisor.stop("gone"))
        with pytest.raises(SandboxLostError, match="it was stopped"):
            await attached.wait()


def test_the_blocking_surface_does_the_same(tmp_path: Path) -> None:
    supervisor = sync.Supervisor()
    (tmp_path / "in").write_text("hello\n")

    supervisor.start(SMALL, name="sync")
    supervisor.copy_in("sync", tmp_path / "in", "/tmp", into=True)
    with supervisor.exec("sync", ["sh", "-c", "cat /tmp/in; cat; exit 3"]) as attached:
        attached.write(b"typed\n")
        attached.close_stdin()
        assert b"".join(attached.stdout) == b"hello\ntyped\n"
        first = attached.wait()
        assert (first.exit_code, first.id) == (3, attached.number)
    with supervisor.exec("sync", ["sleep", "600"], pty=(24, 80)) as attached:
        attached.resize(30, 90)
        attached.kill(9)
        assert attached.wait().signal == 9
    with supervisor.exec("sync", ["sleep", "600"]) as attached:
        attached.kill_all()
    with supervisor.attach("sync", first.id, follow=False) as attached:
        assert b"".join(attached.stdout) == b"hello\ntyped\n"
    supervisor.copy_out("sync", "/tmp/in", tmp_path / "out")
    assert supervisor.publish("sync", 8000).startswith("127.0.0.1:")

    assert (tmp_path / "out").read_text() == "hello\n"
    # Those of other tests may be ending.
    wait_until(lambda: counted(supervisor) == len(supervisor.list()))
    assert supervisor.stop("sync").state == "ended"


def counted(supervisor: sync.Supervisor) -> int:
    status = supervisor.status()
    assert status is not None
    return status.sandboxes


@pytest.mark.parametrize("surface", ["async", "sync"])
async def test_what_a_finished_command_left_is_killed_by_its_number(surface: str) -> None:
    """Long after it: its output is forgotten by then. What others left stays."""
    supervisor = Supervisor()
    await supervisor.start(SMALL, name=surface)
    left = []
    for seconds in ("1111", "2222", "3333"):
        command = ["sh", "-c", f"setsid sleep {seconds} >/dev/null 2>&1 &"]
        async with await supervisor.exec(surface, command) as attached:
            await attached.wait()
            left.append(attached)
    for _ in range(MAX_ENDED + 1):
        async with await supervisor.exec(surface, ["true"]) as attached:
            await attached.wait()
    first, second, third = (each.number for each in left)

    if surface == "async":
        await supervisor.kill_all(surface, first)
    else:
        await asyncio.to_thread(sync.Supervisor().kill_all, surface, first)
    await wait_for_sleepers(supervisor, surface, 2)
    await left[1].kill_all()
    await wait_for_sleepers(supervisor, surface, 1)
    with pytest.raises(UsageError, match=f"no command {third + 1000}"):
        await supervisor.kill_all(surface, third + 1000)
    await supervisor.stop(surface)
    await left[2].kill_all()  # gone with its sandbox

    assert second != third


async def wait_for_sleepers(supervisor: Supervisor, sandbox: str, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with await supervisor.exec(sandbox, ["pgrep", "-c", "sleep"]) as attached:
                if int(b"".join([data async for data in attached.stdout])) == count:
                    return


async def test_a_running_command_is_signalled_by_its_number_and_an_ended_one_not() -> None:
    supervisor = Supervisor()
    await supervisor.start(SMALL, name="signal")
    script = "trap 'echo hup' HUP; echo up; while :; do sleep 0.1; done"
    async with await supervisor.exec("signal", ["sh", "-c", script]) as attached:
        assert await attached.stdout.read() == b"up\n"
        await supervisor.kill("signal", attached.number, signal=1)
        assert await attached.stdout.read() == b"hup\n"
        await supervisor.kill("signal", attached.number, signal=9)
        assert (await attached.wait()).signal == 9
        with pytest.raises(UsageError, match=r"it has ended\. What it left running ends by: "):
            await supervisor.kill("signal", attached.number)
    await supervisor.stop("signal")
