"""taskfactory.agents.host: files and commands on this host."""

import asyncio
import fcntl
import os
import signal
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.processes import children_of, is_alive
from tests.support.waiting import PATIENCE_S, until

from taskfactory.agents import host
from taskfactory.agents.host import HostOperations
from taskfactory.agents.operations import Ending, Entry
from taskfactory.errors import OperationError

HOST = HostOperations()


class Output:
    """Collects output, up to `enough` bytes."""

    def __init__(self, enough: int = 1 << 30) -> None:
        self.data = b""
        self._enough = enough

    def __call__(self, data: bytes) -> bool:
        self.data += data
        return len(self.data) < self._enough


async def test_files_are_written_read_and_listed(tmp_path: Path) -> None:
    path = str(tmp_path / "a" / "b.txt")

    await HOST.write_bytes(path, b"hello")
    await HOST.mkdir(str(tmp_path / "a" / "c" / "d"))

    assert await HOST.read_bytes(path) == b"hello"
    assert await HOST.read_bytes(path, 1, 3) == b"ell"
    assert await HOST.stat(path) == Entry(name="b.txt", kind="file", size=5)
    assert {entry.name: entry.kind for entry in await HOST.list(str(tmp_path / "a"))} == {
        "b.txt": "file",
        "c": "dir",
    }


async def test_a_write_keeps_the_mode_and_follows_a_link(tmp_path: Path) -> None:
    script = tmp_path / "run"
    script.write_text("old")
    script.chmod(0o755)
    link = tmp_path / "link"
    link.symlink_to(script)

    await HOST.write_bytes(str(link), b"new")

    assert link.is_symlink()
    assert (script.read_text(), script.stat().st_mode & 0o777) == ("new", 0o755)


@pytest.mark.parametrize("name", ["missing", "missing/deeper"])
async def test_a_refusal_has_its_errno(tmp_path: Path, name: str) -> None:
    with pytest.raises(OperationError, match="No such file") as caught:
        await HOST.read_bytes(str(tmp_path / name))

    assert caught.value.errno == 2


async def test_a_text_runs_in_bash_and_argv_as_it_is(tmp_path: Path) -> None:
    output = Output()

    first = await HOST.exec(
        "echo $((1+1)); echo err >&2; exit 3", cwd=str(tmp_path), on_output=output
    )
    second = await HOST.exec(["echo", "$((1+1))"], cwd=str(tmp_path), on_output=output)

    assert (first, second) == (Ending(exit_code=3), Ending(exit_code=0))
    assert output.data == b"2\nerr\n$((1+1))\n"


async def test_a_command_has_no_input(tmp_path: Path) -> None:
    assert await HOST.exec("cat", cwd=str(tmp_path), on_output=Output()) == Ending(exit_code=0)


async def test_death_by_a_signal_is_told(tmp_path: Path) -> None:
    ending = await HOST.exec("kill -TERM $$", cwd=str(tmp_path), on_output=Output())

    assert ending.exit_code == 128 + signal.SIGTERM


async def test_a_large_output_arrives_whole(tmp_path: Path) -> None:
    output = Output()

    await HOST.exec("head -c 3000000 /dev/zero", cwd=str(tmp_path), on_output=output)

    assert len(output.data) == 3_000_000


async def test_a_timeout_kills_everything(tmp_path: Path) -> None:
    output = Output()

    for timeout_s in (1, 5, PATIENCE_S):  # a busy host may take seconds to begin
        ending = await HOST.exec(
            "sleep 600 & echo $!; wait", cwd=str(tmp_path), on_output=output, timeout_s=timeout_s
        )
        assert ending.timed_out
        if output.data:
            break

    await _dies(int(output.data))


async def test_what_was_written_before_a_timeout_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though this program stood still, and finds the output and the end of the time at once."""

    start = host._start

    async def started(
        argv: Sequence[str], cwd: str, env: dict[str, str], sink: int
    ) -> asyncio.subprocess.Process:
        process = await start(argv, cwd, env, sink)
        await until(lambda: fcntl.ioctl(sink, termios.FIONREAD, bytes(4)) != bytes(4))
        return process

    output = Output()
    monkeypatch.setattr(host, "_start", started)
    ending = await HOST.exec(
        "echo out; sleep 600", cwd=str(tmp_path), on_output=output, timeout_s=0
    )

    assert ending.timed_out
    assert output.data == b"out\n"


async def test_a_sink_that_has_enough_ends_the_command(tmp_path: Path) -> None:
    ending = await HOST.exec("yes", cwd=str(tmp_path), on_output=Output(enough=100_000))

    assert ending.stopped


async def test_cancelling_kills_everything(tmp_path: Path) -> None:
    output = Output()

    running = asyncio.get_running_loop().create_task(
        HOST.exec("sleep 600 & echo $!; wait", cwd=str(tmp_path), on_output=output)
    )
    await until(lambda: output.data)
    running.cancel()
    await asyncio.wait([running])

    assert running.cancelled()

    await _dies(int(output.data))


async def test_cancelling_at_any_moment_of_a_start_leaves_no_process(tmp_path: Path) -> None:
    before = children_of(os.getpid())
    for turns in range(30):
        starting = asyncio.get_running_loop().create_task(
            HOST.exec("sleep 600", cwd=str(tmp_path), on_output=Output())
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait([starting])

        assert starting.cancelled()
        assert set(children_of(os.getpid())) <= set(before)


async def test_a_child_that_lives_on_is_not_waited_for(tmp_path: Path) -> None:
    output = Output()

    async with asyncio.timeout(PATIENCE_S):
        await HOST.exec("sleep 600 & echo $!", cwd=str(tmp_path), on_output=output)

    child = int(output.data)
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("argv", [["no-such-program"], ["./missing"]])
async def test_a_missing_program_is_a_refusal(tmp_path: Path, argv: list[str]) -> None:
    with pytest.raises(OperationError) as caught:
        await HOST.exec(argv, cwd=str(tmp_path), on_output=Output())

    assert caught.value.errno == 2


async def _dies(pid: int) -> None:
    """A killed process is gone soon, not at once: the kernel ends it when it is next scheduled."""
    await until(lambda: not is_alive(pid))
