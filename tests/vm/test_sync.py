"""What is special about blocking: threads, a running loop, Ctrl-C, the interpreter's exit, fork.

Covers taskvm.sync.bridge, taskvm.sync.sandbox, taskvm.sync.process, taskvm.sync.files and taskvm.sync.pool. What both
surfaces promise is claimed once, in the modules that say BOTH_SURFACES.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.processes import is_alive
from tests.support.waiting import PATIENCE_S, wait_until

from taskvm import SandboxStateError, UsageError
from taskvm.opening import Opening
from taskvm.sync import HostDir, Process, Sandbox, WarmPool

pytestmark = pytest.mark.vm

CREATE = "from taskvm.sync import Sandbox\nvm = Sandbox.create(cpus=1, memory_mib=256)\n"


@pytest.fixture
def blocking() -> Iterator[Sandbox]:
    """A running sandbox of the synchronous surface."""
    with Sandbox.create(**GUEST) as vm:
        yield vm


def _python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def _count(vm: Sandbox, pattern: str) -> str:
    return vm.exec(f"pgrep -fc '{pattern}'").stdout.strip()


def test_a_plain_call_makes_a_sandbox_that_close_ends() -> None:
    """Without `with`: running after create, closed after close, twice too, and its QEMU is gone."""
    vm = Sandbox.create(**GUEST)
    before = (vm.state, vm.exec(["hostname"]).stdout, is_alive(vm.host_pid))
    vm.close()
    vm.close()

    assert before == ("running", f"{vm.id}\n", True)
    assert vm.state == "closed"
    assert not is_alive(vm.host_pid)
    with pytest.raises(SandboxStateError, match="closed"):
        vm.exec("true")


def test_mounts_and_the_audit_log_are_those_of_the_call(tmp_path: Path, workspace: Path) -> None:
    """create passes its arguments on."""
    with Sandbox.create(
        mounts={"/workspace": HostDir(workspace)}, audit_path=tmp_path / "audit", **GUEST
    ) as vm:
        vm.exec("echo made in the guest > made")
        where = vm.audit_path

    assert (workspace / "made").read_text() == "made in the guest\n"
    assert where == tmp_path / "audit"


def test_a_loop_that_runs_in_the_calling_thread_does_not_matter() -> None:
    """A notebook's cell runs inside a loop; a blocking call works there all the same."""
    import asyncio

    async def cell() -> str:
        with Sandbox.create(**GUEST) as vm:
            return vm.exec("echo from a cell").stdout

    assert asyncio.run(cell()) == "from a cell\n"


def test_threads_share_one_sandbox(blocking: Sandbox) -> None:
    """Twelve threads, each with commands and files of its own, at once."""

    def work(number: int) -> tuple[str, str]:
        path = f"/tmp/{number}"
        blocking.files.write_text(path, f"file {number}")
        return blocking.exec(f"echo {number}").stdout, blocking.files.read_text(path)

    with ThreadPoolExecutor(12) as threads:
        results = list(threads.map(work, range(12)))

    assert results == [(f"{number}\n", f"file {number}") for number in range(12)]


def test_one_thread_reads_while_another_writes(blocking: Sandbox) -> None:
    """A read that waits does not hold up a write to the same process."""
    with blocking.spawn("cat") as process, ThreadPoolExecutor(1) as threads:
        reading = threads.submit(process.stdout.read)
        process.write(b"hello")
        data = reading.result()
        process.close_stdin()
        result = process.wait()

    assert (data, result.exit_code) == (b"hello", 0)


def test_callbacks_and_iterators_run_in_the_thread_that_called(tmp_path: Path) -> None:
    """Progress and standard input may use what belongs to the caller's thread."""
    threads: set[threading.Thread] = set()

    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            threads.add(threading.current_thread())
            yield b"piece\n"

    with Sandbox.create(**GUEST) as vm:
        output = vm.exec("cat", stdin=pieces()).stdout

    assert output == "piece\n" * 3
    assert threads == {threading.current_thread()}


def test_progress_is_told_in_the_thread_that_called() -> None:
    """A callback's line comes before the call returns, and its exception ends the call."""
    from taskvm.sync.bridge import Bridge, Call

    heard: list[tuple[str, threading.Thread]] = []
    call = Call(Bridge.current())
    tell = call.callback(lambda line: heard.append((line, threading.current_thread())))

    async def work() -> int:
        tell("half way")
        return 7

    assert call.run(work) == 7
    assert heard == [("half way", threading.current_thread())]


class Started:
    """A sandbox that has come up."""

    closed = False

    async def close(self) -> None:
        self.closed = True


def test_a_sandbox_that_has_started_when_its_start_is_ended_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A callback's exception may come when all is done: nobody has the sandbox."""
    from taskvm.sync import sandbox as module
    from taskvm.sync.bridge import Bridge

    started = Started()

    def fail_late(_line: str) -> None:
        wait_until(lambda: started in Bridge.current()._closers)
        Bridge.current().call(asyncio.sleep, 0.01)
        raise LookupError("the line could not be shown")

    async def start(on_progress: Callable[[str], None]) -> Started:
        on_progress("starting")
        return started

    def create(*, on_progress: Callable[[str], None], **_: object) -> Opening[Started]:
        return Opening(lambda: start(on_progress))

    monkeypatch.setattr(module.aio.Sandbox, "create", create)
    with pytest.raises(LookupError, match="could not be shown"):
        Sandbox.create(on_progress=fail_late)

    assert started.closed
    assert started not in Bridge.current()._closers


def test_an_iterators_exception_ends_the_exec_and_is_raised(blocking: Sandbox) -> None:
    """The command does not stay behind."""

    def pieces() -> Iterator[bytes]:
        yield b"some"
        raise LookupError("the source broke")

    with pytest.raises(LookupError, match="the source broke"):
        blocking.exec("cat; sleep 6543", stdin=pieces())

    wait_until(lambda: _count(blocking, "sleep [6]543") == "0")


def test_ctrl_c_ends_the_exec_and_what_it_started(blocking: Sandbox) -> None:
    """KeyboardInterrupt is raised at once, the command dies, and the sandbox works on."""
    interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it may come before the command has started
        interrupt.start()
        blocking.exec("setsid sleep 9876 & sleep 9876")

    wait_until(lambda: _count(blocking, "sleep [9]876") == "0")


def test_leaving_the_process_block_by_an_error_ends_it(blocking: Sandbox) -> None:
    """`with` around a process kills it, also when the body fails."""
    with pytest.raises(ZeroDivisionError), blocking.spawn("sleep 8765"):
        raise ZeroDivisionError

    wait_until(lambda: _count(blocking, "sleep [8]765") == "0")


def test_a_pool_serves_blocking_sandboxes() -> None:
    """Guests started ahead become sandboxes; leaving the pool ends the rest."""
    with WarmPool(size=1, **GUEST) as pool:
        pool.wait_full()
        with Sandbox.create(pool=pool, **GUEST) as vm:
            assert vm.exec(["echo", "ready"]).stdout == "ready\n"

    with pytest.raises(SandboxStateError, match="not open"):
        Sandbox.create(pool=pool, **GUEST)


def test_a_server_of_the_guest_is_reached_until_the_block_is_left(blocking: Sandbox) -> None:
    """`forward` returns where to connect; afterwards nothing listens there."""
    serve = (
        "import socket; s = socket.create_server(('127.0.0.1', 8080)); print('up', flush=True)\n"
    )
    with blocking.spawn(["python3", "-c", serve + "s.accept()[0].sendall(b'hello')"]) as server:
        server.stdout.read()
        with (
            blocking.forward(8080) as way,
            socket.create_connection((way.host, way.port)) as client,
        ):
            assert client.recv(100) == b"hello"

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((way.host, way.port))


def test_a_file_passes_in_pieces_and_may_be_left_early(blocking: Sandbox, tmp_path: Path) -> None:
    """Streams are plain iterators, and as many may be left early as one likes."""
    blocking.files.write_stream("/tmp/pieces", (b"x" * 100_000 for _ in range(10)))
    whole = b"".join(blocking.files.open_read("/tmp/pieces"))
    for _ in range(40):
        with contextlib.closing(blocking.files.open_read("/tmp/pieces")) as pieces:
            assert next(pieces)
    blocking.files.copy_out("/tmp/pieces", tmp_path / "copy")

    assert whole == b"x" * 1_000_000
    assert (tmp_path / "copy").read_bytes() == whole


def test_a_terminal_can_be_asked_for(blocking: Sandbox) -> None:
    """`pty` and `resize` reach the guest, and `statistics` the host."""
    with blocking.spawn("read; stty size", pty=(30, 90)) as process:
        process.resize(40, 100)
        process.write(b"\n")
        output = b"".join(process.stdout)

    assert b"40 100" in output
    assert blocking.statistics().uptime_s > 0


def test_wrong_arguments_are_refused_in_the_call() -> None:
    """UsageError reaches the caller as itself."""
    with pytest.raises(UsageError):
        Sandbox.create(mounts={"relative": HostDir("/tmp")}, **GUEST)


def test_exit_closes_what_is_open(tmp_path: Path) -> None:
    """A program that forgets `close` ends at once, without a word, and what it wrote to a mount is on the host."""
    program = (
        "import sys\nfrom taskvm.sync import HostDir, Sandbox\n"
        "vm = Sandbox.create(mounts={'/workspace': HostDir(sys.argv[1])}, cpus=1, memory_mib=256)\n"
        "vm.exec('echo kept > file')\nvm.spawn('sleep 1000')\nprint(vm.host_pid)"
    )
    result = _python(program, str(tmp_path))

    assert (result.returncode, result.stderr) == (0, "")
    assert not is_alive(int(result.stdout))
    assert (tmp_path / "file").read_text() == "kept\n"


def test_exit_does_not_wait_for_threads_that_wait_in_a_call() -> None:
    """Daemon threads in exec, wait and read hold up nothing."""
    program = (
        CREATE + "import contextlib, threading, time, taskvm\n"
        "process = vm.spawn('sleep 1000')\n"
        "def wait(call):\n"
        "    with contextlib.suppress(taskvm.SandboxError): call()\n"
        "for call in (lambda: vm.exec('sleep 1000'), process.wait, process.stdout.read):\n"
        "    threading.Thread(target=wait, args=[call], daemon=True).start()\n"
        # Longer than this test waits: what ends has not been given up.
        f"from taskvm.sync import bridge\nbridge.EXIT_TIMEOUT_S = {2 * PATIENCE_S}\n"
        "time.sleep(0.5)\nprint(vm.host_pid)"
    )
    result = _python(program)

    assert (result.returncode, result.stderr) == (0, "")
    assert not is_alive(int(result.stdout))


def test_exit_after_an_error_shows_the_error_only() -> None:
    """An uncaught exception is the last word of the program."""
    result = _python(CREATE + "raise SystemExit('the end')")

    assert (result.returncode, result.stderr) == (1, "the end\n")


def test_a_forked_child_is_refused_clearly_and_may_start_its_own() -> None:
    """The parent's sandbox says why it does not work in the child; the child's end leaves the parent's running."""
    program = (
        CREATE + "import os, sys, taskvm\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try: vm.exec('true')\n"
        "    except taskvm.SandboxStateError as error: print(error, flush=True)\n"
        "    own = Sandbox.create(cpus=1, memory_mib=256)\n"
        "    print(own.exec('echo own').stdout, flush=True)\n"
        "    sys.exit(0)\n"
        "_, status = os.waitpid(child, 0)\n"
        "print(status, vm.exec('echo parent').stdout)"
    )
    result = _python(program)

    assert result.stderr == ""
    assert "fork does not copy its threads" in result.stdout
    assert "own\n" in result.stdout
    assert "0 parent\n" in result.stdout


def test_a_forked_child_that_leaves_the_block_closes_nothing() -> None:
    """The child's way out is its own; the parent's sandbox goes on."""
    program = (
        "import os, sys\nfrom taskvm.sync import Sandbox\n"
        "with Sandbox.create(cpus=1, memory_mib=256) as vm, vm.spawn('cat') as process:\n"
        "    child = os.fork()\n"
        "    if child == 0: sys.exit(3)\n"
        "    _, status = os.waitpid(child, 0)\n"
        "    process.write(b'still here')\n"
        "    print(os.waitstatus_to_exitcode(status), process.stdout.read())"
    )
    result = _python(program)

    assert (result.stdout, result.stderr) == ("3 b'still here'\n", "")


def test_closing_again_after_the_exits_own_closing_is_no_error() -> None:
    """A program's own `atexit`, registered earlier and so run later, may close too."""
    program = (
        "import atexit\nclosers = []\natexit.register(lambda: [close() for close in closers])\n"
        + CREATE
        + "closers.append(vm.close)"
    )
    result = _python(program)

    assert (result.returncode, result.stderr) == (0, "")


def test_the_loops_own_thread_may_not_block_on_itself(blocking: Sandbox) -> None:
    """What would wait for ever is an error."""
    from taskvm.sync.bridge import Bridge

    async def inside() -> Process:
        return blocking.spawn("true")

    with pytest.raises(SandboxStateError, match="wait for itself"):
        Bridge.current().call(inside)
