"""Sandboxes that outlive the command line, as a person uses them: real supervisors in directories of their own.

taskvm.supervisor.client, taskvm.supervisor.connection, taskvm.supervisor.server, taskvm.supervisor.holding,
taskvm.supervisor.job, taskvm.supervisor.attachment, taskvm.supervisor.spawn, taskvm.supervisor.place,
taskvm.supervisor.roster, taskvm.cli.sandboxes, taskvm.cli.supervisor, taskvm.cli.serving.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.processes import descendants_of, is_alive
from tests.support.screen import PROMPT, SMALL, TASKVM, Screen
from tests.support.waiting import PATIENCE_S, wait_until

from taskvm import sync
from taskvm.vm.rundir import run_base

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("runtime")]


def taskvm(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TASKVM, *arguments],
        **{"capture_output": True, "text": True, "timeout": PATIENCE_S, **options},
    )


def listed(*, ended: bool = False) -> dict[str, dict[str, Any]]:
    """What `ps --json` prints, by name; without a process for each look."""
    found = msgspec.to_builtins(sync.Supervisor().list(ended=ended))
    return {each["name"]: each for each in found}


def supervisor_pid() -> int:
    status = sync.Supervisor().status()
    assert status is not None
    return status.pid


@pytest.fixture(scope="module")
def work(runtime: Path) -> Iterator[str]:
    """A sandbox of this name that runs."""
    started = taskvm("start", *SMALL, "--name", "work")
    assert started.returncode == 0, started.stderr
    yield "work"
    taskvm("stop", "work")


# Running.


def test_a_command_of_a_held_sandbox_is_like_one_of_run(work: str) -> None:
    """Input, both outputs, status, account, directory and variables are the command's."""
    script = "cat; id -u; pwd; echo $K; echo err >&2; exit 9"
    options = ["--user", "root", "--cwd", "/tmp", "--env", "K=v"]

    done = taskvm("exec", *options, work, "--", "sh", "-c", script, input="in\n")

    assert (done.stdout, done.stderr, done.returncode) == ("in\n0\n/tmp\nv\n", "err\n", 9)


def test_output_of_a_pipe_is_whole_however_slowly_it_is_read(work: str) -> None:
    """More than a ring: the command waits for its reader, and nothing is skipped."""
    command = [TASKVM, "exec", work, "seq", "300000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as producer:
        assert producer.stdout is not None
        time.sleep(1)

        assert producer.stdout.read() == "".join(f"{number}\n" for number in range(1, 300001))
        assert producer.wait(PATIENCE_S) == 0


def test_a_command_of_a_held_sandbox_has_its_limits(work: str) -> None:
    limits = ["--limit-memory", "50", "--limit-processes", "7", "--limit-cpus", "0.5"]
    script = 'cd "/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)" && cat memory.max pids.max cpu.max cpu.weight'

    limited = taskvm("exec", *limits, "--cpu-weight", "50", work, "--", "sh", "-c", script)
    impossible = taskvm("exec", "--limit-memory", "0", work, "--", "true")

    assert limited.stdout.split("\n") == [f"{50 << 20}", "7", "50000 100000", "50", ""]
    assert (impossible.returncode, impossible.stdout) == (2, "")


def test_a_command_beyond_its_timeout_is_killed(work: str) -> None:
    done = taskvm("exec", "--timeout", "0.5", work, "sleep", "60")

    assert (done.returncode, listed()[work]["execs"][-1]["exit_code"]) == (124, 137)


def test_kill_ends_a_command_and_with_all_what_it_left(work: str) -> None:
    number = taskvm("exec", "-d", work, "--", "sh", "-c", "sleep 7777 & exec sleep 6666").stdout
    number = number.strip()

    signalled = taskvm("kill", "--signal", "KILL", work, number)
    wait_until(lambda: ending(work, number) == 137)
    again = taskvm("kill", work, number)
    all_of_it = taskvm("kill", "--all", work, number)

    assert (signalled.returncode, signalled.stderr) == (0, "")
    assert (again.returncode, all_of_it.returncode) == (2, 0)
    assert f"taskvm kill --all {work} {number}" in again.stderr
    wait_until(lambda: taskvm("exec", work, "--", "pgrep", "-f", "^sleep 7777").returncode == 1)


def ending(sandbox: str, number: str) -> object:
    return next(
        each["exit_code"] for each in listed()[sandbox]["execs"] if each["number"] == int(number)
    )


def test_ctrl_c_ends_what_exec_has_started(work: str) -> None:
    process = subprocess.Popen(
        [TASKVM, "exec", work, "sh", "-c", "echo up; exec sleep 600"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"

    process.send_signal(signal.SIGINT)

    assert process.wait(PATIENCE_S) == 130
    wait_until(lambda: listed()[work]["execs"][-1]["exit_code"] is not None)
    process.stdout.close()


def test_a_reader_that_leaves_ends_what_exec_has_started(work: str) -> None:
    """`taskvm exec … | head -1` leaves no endless command behind."""
    with subprocess.Popen([TASKVM, "exec", work, "yes"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()

        assert process.wait(PATIENCE_S) == 141
    wait_until(lambda: listed()[work]["execs"][-1]["exit_code"] is not None)


def test_what_is_listed_says_what_it_uses(work: str) -> None:
    """`ps` has the figures of the sandbox, as a table and as JSON."""
    printed = json.loads(taskvm("ps", "--json").stdout)
    (status,) = (each for each in printed if each["name"] == work)
    table = taskvm("ps").stdout.splitlines()

    assert status.keys() == listed()[work].keys()

    assert status["state"] in ("running", "paused")
    assert status["memory_bytes"] > 10 << 20
    assert status["cpu_s"] > 0
    assert table[0].split()[:4] == ["ID", "NAME", "IMAGE", "STATE"]
    assert any(line.startswith(f"{status['id']}  work ") for line in table)


@pytest.mark.parametrize("start", ["sandbox-{}", "{}", "{:.6}"])
def test_an_id_or_its_beginning_names_a_sandbox(work: str, start: str) -> None:
    digits = listed()[work]["id"].removeprefix("sandbox-")

    assert taskvm("exec", start.format(digits), "echo", "here").stdout == "here\n"


def test_a_tree_goes_in_and_comes_out(work: str, tmp_path: Path) -> None:
    """Into a directory under its own name; out whole, links as links, and over nothing."""
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").write_bytes(bytes(range(256)) * 4096)
    (tree / "link").symlink_to("/etc/passwd")

    into = taskvm("cp", str(tree), f"{work}:/tmp/")
    out = taskvm("cp", f"{work}:/tmp/tree", "back", cwd=tmp_path)
    again = taskvm("cp", f"{work}:/tmp/tree", "back/deep/../..", cwd=tmp_path)

    assert (into.returncode, out.returncode) == (0, 0), into.stderr + out.stderr
    assert (tmp_path / "back" / "deep" / "file").read_bytes() == bytes(range(256)) * 4096
    assert (tmp_path / "back" / "link").readlink() == Path("/etc/passwd")
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_of_a_guests_link_comes_a_file_and_of_the_hosts_nothing_goes_in(
    work: str, tmp_path: Path
) -> None:
    """A guest may have made the host's, in a folder that it can write to, to be given another file."""
    (tmp_path / "key").write_text("the host's\n")
    (tmp_path / "report").symlink_to("key")
    taskvm("exec", work, "sh", "-c", "echo guests > /tmp/v1; ln -s v1 /tmp/latest")

    out = taskvm("cp", f"{work}:/tmp/latest", ".", cwd=tmp_path)
    into = taskvm("cp", "report", f"{work}:/tmp/report", cwd=tmp_path)

    assert out.returncode == 0, out.stderr
    assert not (tmp_path / "latest").is_symlink()
    assert (tmp_path / "latest").read_text() == "guests\n"
    assert into.returncode == 2
    assert f"if the guest may have that: {tmp_path / 'key'}\n" in into.stderr
    assert taskvm("exec", work, "test", "-e", "/tmp/report").returncode == 1


def test_a_slash_at_the_end_of_a_files_target_makes_a_directory(work: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello\n")

    done = taskvm("cp", str(tmp_path / "file"), f"{work}:/tmp/made/for/it/")

    assert done.returncode == 0, done.stderr
    assert taskvm("exec", work, "cat", "/tmp/made/for/it/file").stdout == "hello\n"


def test_a_server_in_it_is_made_reachable(work: str) -> None:
    """At the address that is printed, and listed."""
    server = "import socket; s = socket.create_server(('127.0.0.1', 8000)); s.accept()[0].sendall(b'served')"
    taskvm("exec", "-d", work, "python3", "-c", server)
    wait_until(lambda: ":1F40 " in taskvm("exec", work, "cat", "/proc/net/tcp").stdout)

    address = taskvm("publish", work, "8000").stdout.strip()

    assert listed()[work]["forwards"] == {address: 8000}
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as connection:
        assert connection.recv(100) == b"served"


# Outliving.


def test_a_detached_command_runs_to_its_end_and_is_remembered(
    runtime: Path, tmp_path: Path
) -> None:
    """Its output and its status are there after both ends; the sandbox has ended with it."""
    # Its input is empty, and its directory is the one that the command line was in.
    script = "cat; echo out; echo err >&2; sleep 1; echo last | tee file; exit 4"
    options = [*SMALL, "--name", "job", "--mount", ".:/workspace"]
    started = taskvm("run", "-d", *options, "--", "sh", "-c", script, cwd=tmp_path)
    followed = taskvm("logs", "-f", "job")
    status = taskvm("attach", "job").returncode

    assert started.stdout == f"{listed(ended=True)['job']['id']}\n"
    assert (followed.stdout, followed.stderr) == ("out\nlast\n", "err\n")
    assert status == 4
    assert (tmp_path / "file").read_text() == "last\n"
    assert listed(ended=True)["job"]["outcome"] == "its command ended with 4"
    assert "job" not in listed()
    assert not (run_base() / started.stdout.strip()).exists()


def test_a_command_is_left_in_the_background(work: str) -> None:
    """Its number finds it again."""
    script = "cat; while ! test -e /tmp/on; do sleep 0.1; done; echo over; exit 3"
    number = taskvm("exec", "-d", work, "sh", "-c", script).stdout.strip()

    taskvm("exec", work, "touch", "/tmp/on")
    done = taskvm("attach", work, number)

    assert (done.stdout, done.returncode) == ("over\n", 3)


def test_output_beyond_the_ring_is_gone_and_the_last_is_kept(work: str) -> None:
    """`logs` has the last 256 KiB of a command that nobody read, and that waited for nobody."""
    script = "seq 60000; echo done; sleep 600"
    number = taskvm("exec", "-d", work, "sh", "-c", script).stdout.strip()

    wait_until(lambda: taskvm("logs", work, number).stdout.endswith("done\n"))
    kept = taskvm("logs", work, number).stdout

    assert len(kept) == 256 * 1024
    assert kept.endswith("59999\n60000\ndone\n")


def test_a_client_that_does_not_read_stops_only_its_own_command(runtime: Path) -> None:
    """Others run beside it, and the sandbox ends when it is told to."""
    taskvm("start", *SMALL, "--name", "stuck")
    with subprocess.Popen([TASKVM, "exec", "stuck", "yes"], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.read(4) == b"y\ny\n"

        assert taskvm("exec", "stuck", "echo", "beside").stdout == "beside\n"
        assert taskvm("stop", "stuck").returncode == 0
        client.kill()


def test_a_client_that_is_killed_leaves_its_command(work: str) -> None:
    command = [TASKVM, "exec", "-t", work, "sh", "-c", "echo up; sleep 600"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\r\n"
        client.kill()

    wait_until(lambda: listed()[work]["execs"][-1]["attached"] == 0)
    assert listed()[work]["execs"][-1]["exit_code"] is None


def test_a_shell_is_left_and_found_again_with_its_job(runtime: Path) -> None:
    """Ctrl-P Ctrl-Q gives the terminal back; attach shows the past, and two may be there at once."""
    first = Screen("shell", *SMALL, "--name", "left")
    first.wait_for(PROMPT)
    first.type(b"sh -c 'echo job; while ! test -e /tmp/go; do sleep 0.1; done; echo went' &\r")
    first.wait_for(b"job\r\n")
    first.type(b"\x10")  # alone it is the shell's: the last command again
    first.wait_for(b"echo went")
    first.type(b"\x15\x10\x11")
    assert first.end() == 0
    assert first.settings == first.before
    first.close()

    second, third = Screen("attach", "left", size=(40, 100)), Screen("attach", "left")
    for screen in (second, third):
        screen.wait_for(b"job\r\n")
    assert taskvm("exec", "left", "touch", "/tmp/go").returncode == 0
    for screen in (second, third):
        screen.wait_for(b"went\r\n")
    second.type(b"echo from-$((1 + 1))\r")
    third.wait_for(b"from-2\r\n")
    third.type(b"exit 6\r")

    assert (second.end(), third.end()) == (6, 6)
    assert "left" not in listed()
    for screen in (second, third):
        screen.close()


def test_a_terminal_that_hangs_up_leaves_the_shell_running(runtime: Path) -> None:
    screen = Screen("shell", *SMALL, "--name", "hung")
    screen.wait_for(PROMPT)

    screen.hang_up()

    assert screen.end() == 129
    screen.close()
    assert listed()["hung"]["execs"][0]["exit_code"] is None
    assert taskvm("stop", "hung").returncode == 0
    assert "hung" not in listed()


# Ending.


def test_an_idle_sandbox_ends(runtime: Path) -> None:
    """Also one whose shell waits at its prompt, as nobody is there."""
    started = taskvm("run", "-dt", *SMALL, "--name", "idle", "--idle-timeout", "10", "--", "bash")
    assert started.returncode == 0
    assert 0 <= listed(ended=True)["idle"]["idle_left_s"] <= 10

    wait_until(lambda: "idle" not in listed())

    assert "nothing happened" in listed(ended=True)["idle"]["outcome"]


def test_a_life_that_is_over_ends_a_held_sandbox(runtime: Path) -> None:
    taskvm("start", *SMALL, "--name", "short", "--max-duration", "1")

    wait_until(lambda: "short" not in listed())

    assert "max_duration" in listed(ended=True)["short"]["outcome"]


def test_stopping_tells_who_is_attached(runtime: Path) -> None:
    """And releases what the sandbox had on the host."""
    started = taskvm("run", "-d", *SMALL, "--name", "stopped", "--", "sleep", "600")
    client = subprocess.Popen([TASKVM, "attach", "stopped"], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: listed()["stopped"]["execs"][0]["attached"])

    stopped = taskvm("stop", "stopped")
    _, said = client.communicate(timeout=PATIENCE_S)

    assert (stopped.returncode, stopped.stdout) == (0, started.stdout)
    assert client.returncode == 125
    assert "it was stopped" in said
    assert not (run_base() / started.stdout.strip()).exists()


# Names and errors.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["exec", "nobody", "true"], "there is none"),
        (
            ["exec", "work", "--user", "nobody", "--", "id"],
            "Write options before the sandbox's name",
        ),
        (["stop"], "--all"),
        (["attach", "work", "999"], "no command 999"),
        (["logs", "work", "999"], "`taskvm ps` has the numbers"),
        (["cp", "/etc/passwd", "/tmp/x"], "SANDBOX:PATH"),
        (["start", *SMALL, "--name", "work"], "has this name"),
        (["start", *SMALL, "--name", "-x"], "a name has"),
        (["start", *SMALL, "--idle-timeout", "nan"], "--idle-timeout nan"),
        (
            ["start", *SMALL, "--user", "nobody"],
            "start a sandbox with --user: that is for one command",
        ),
        (["start", *SMALL, "--limit-memory", "64"], "Say it to taskvm exec"),
        (["run", *SMALL, "--name", "x", "--", "true"], "--detach"),
        (["run", *SMALL, "--idle-timeout", "5", "--", "true"], "--detach"),
        (["exec", "--user", "nosuch", "work", "true"], "nosuch"),
        (["shell", "--detach-keys", "ctrl-"], "not a terminal"),
    ],
    ids=lambda each: " ".join(each)[:40] if isinstance(each, list) else "",
)
def test_a_wrong_use_is_one_line(work: str, arguments: list[str], said: str) -> None:
    done = taskvm(*arguments, stdin=subprocess.DEVNULL)

    assert done.returncode in (2, 125)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


# The process.


def test_concurrent_first_commands_start_one_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor of its own for this test; all its sandboxes end with `supervisor stop`."""
    monkeypatch.setenv("TASKVM_RUNTIME", str(tmp_path / "place"))
    clients = [
        subprocess.Popen([TASKVM, "start", *SMALL], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ids = {client.communicate(timeout=PATIENCE_S)[0].strip() for client in clients}

    assert len(ids) == 3
    assert set(taskvm("ps", "-q").stdout.split()) == ids
    assert (tmp_path / "place").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "place" / "socket").stat().st_mode & 0o777 == 0o600
    assert taskvm("supervisor", "stop").stdout == "stopped\n"
    assert taskvm("supervisor", "status").returncode == 1
    assert [name for name in ids if (run_base() / name).exists()] == []


def test_a_supervisor_that_is_killed_leaves_nothing_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clients learn it at once, its machines die with it, and the next command starts another."""
    monkeypatch.setenv("TASKVM_RUNTIME", str(tmp_path))
    started = taskvm("run", "-d", *SMALL, "--name", "doomed", "--", "sleep", "600")
    client = subprocess.Popen([TASKVM, "attach", "doomed"], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: listed()["doomed"]["execs"][0]["attached"])
    machines = descendants_of(supervisor_pid())
    assert machines

    os.kill(supervisor_pid(), signal.SIGKILL)
    _, said = client.communicate(timeout=PATIENCE_S)

    assert client.returncode == 125
    assert "it has ended, and they with it" in said
    wait_until(lambda: not any(map(is_alive, machines)))
    assert listed() == {}
    assert taskvm("run", "-d", *SMALL, "--name", "doomed", "--", "true").returncode == 0
    wait_until(lambda: not (run_base() / started.stdout.strip()).exists())
    taskvm("supervisor", "stop")
