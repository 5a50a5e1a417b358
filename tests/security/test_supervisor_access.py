"""Who may talk to the supervisor, and where the values of secrets are while it holds a sandbox."""

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.processes import descendants_of
from tests.support.screen import SMALL, TASKVM
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.vm
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A supervisor's directory that another user could reach, and its supervisor."""
    with tempfile.TemporaryDirectory(prefix="taskvm-") as directory:
        monkeypatch.setenv("TASKVM_RUNTIME", directory)
        yield Path(directory)
        subprocess.run([TASKVM, "supervisor", "stop"], check=False)


class Nobody:
    """A fork of this process as another user, in `place`; what `work` returns is read by `said`."""

    def __init__(self, place: Path, work: Callable[[], bytes]) -> None:
        self._output, output = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.chdir(place)
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                os.write(output, work())
            finally:
                os._exit(0)
        os.close(output)

    def said(self) -> bytes:
        with open(self._output, "rb") as output:
            said = output.read()
        os.waitpid(self._pid, 0)
        return said


def _connect() -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect("socket")
        return b"greeted with " + sock.recv(100)


def _listen() -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.bind("listening")
        sock.listen()
        Path("listening").rename("socket")  # whoever finds it is heard
        connection, _ = sock.accept()
        with connection:
            return b"told " + connection.recv(100)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@needs_root
def test_another_user_is_hung_up_on(place: Path) -> None:
    """Even with the permissions of directory and socket gone wrong, the kernel's word counts."""
    with subprocess.Popen([TASKVM, "supervisor", "run"]) as supervisor:
        wait_for(lambda: (place / "log").exists() and "serves" in (place / "log").read_text())
        place.chmod(0o755)
        (place / "socket").chmod(0o666)
        answer = Nobody(place, _connect).said()
        supervisor.terminate()
    place.chmod(0o700)

    assert answer == b"greeted with "
    assert f"refused a connection of the user {NOBODY}" in (place / "log").read_text()


@needs_root
def test_another_users_socket_is_not_believed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gets a secret by listening where a supervisor would."""
    place.chmod(0o777)
    listener = Nobody(place, _listen)
    wait_for((place / "socket").exists)
    place.chmod(0o700)
    monkeypatch.setenv("TOKEN", "canary-61")
    options = ["--allow", "a.example", "--secret", "TOKEN@a.example"]

    done = subprocess.run(
        [TASKVM, "start", *SMALL, *options], capture_output=True, text=True, check=False
    )

    assert done.returncode == 125
    assert "runs as another user" in done.stderr
    assert listener.said() == b"told "
    (place / "socket").unlink()


def test_values_of_secrets_are_in_no_argument_file_or_environment(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the supervisor and everything it starts; nor has it any other variable of its starter's."""
    monkeypatch.setenv("TOKEN", "canary-71")
    monkeypatch.setenv("OTHER", "canary-72")
    options = ["--allow", "a.example", "--secret", "TOKEN@a.example", "--name", "s"]

    started = subprocess.run(
        [TASKVM, "start", *SMALL, *options], capture_output=True, text=True, check=True
    )
    told = subprocess.run([TASKVM, "ps", "--json"], capture_output=True, text=True, check=True)
    seen = subprocess.run(
        [TASKVM, "exec", "s", "--", "sh", "-c", "echo $TOKEN"],
        capture_output=True,
        text=True,
        check=True,
    )
    status = subprocess.run([TASKVM, "supervisor", "status"], capture_output=True, text=True)
    pid = int(status.stdout.partition("process ")[2].partition(",")[0])
    kept = "".join(_readable(pid)) + "".join(
        path.read_text(errors="replace") for path in place.iterdir() if path.is_file()
    )

    assert seen.stdout.startswith("taskvm_secret_TOKEN_")
    assert json.loads(told.stdout)[0]["name"] == "s"
    assert "canary" not in kept + told.stdout + started.stderr + seen.stdout
    assert "TASKVM_RUNTIME" in kept


def _readable(pid: int) -> Iterator[str]:
    """Yield arguments and environment of a process and its descendants."""
    for process in (pid, *descendants_of(pid)):
        for name in ("cmdline", "environ"):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                yield Path(f"/proc/{process}/{name}").read_text(errors="replace")
