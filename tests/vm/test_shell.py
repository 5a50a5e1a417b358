"""`taskvm shell` and `run --tty` on a real terminal (taskvm.terminal, taskvm.cli.streams, taskvm.cli.attached)."""

import signal
import subprocess
from collections.abc import Iterator

import pytest
from tests.support.screen import PROMPT, SMALL, TASKVM, Screen
from tests.support.waiting import PATIENCE_S

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("runtime")]


@pytest.fixture
def shell() -> Iterator[Screen]:
    """A shell of a new sandbox that shows its prompt."""
    screen = Screen("shell", *SMALL, size=(30, 100))
    screen.wait_for(PROMPT)
    yield screen
    screen.close()


def test_a_shell_is_a_login_shell_on_the_users_terminal(shell: Screen) -> None:
    """It has the terminal's size and kind, and its exit status is the command's; the terminal is restored."""
    shell.type(b"stty size; echo $TERM; shopt login_shell; exit 7\r")
    shell.wait_for(b"30 100\r\n")
    shell.wait_for(b"vt220\r\n")
    shell.wait_for(b"login_shell    \ton")

    assert shell.end() == 7
    assert shell.settings == shell.before


def run_cat(shell: Screen) -> None:
    """Return when it has answered: until then bash may be given the next key, or a shell that is about to become the
    program, which forgets it (dash, from its handler of SIGINT to execve).
    """
    shell.type(b"echo go; cat\r")
    shell.wait_for(b"\rgo\r\n")
    shell.type(b"line\r")
    shell.wait_for(b"line\r\nline\r\n")


def test_keys_are_the_guests(shell: Screen) -> None:
    """Ctrl-C ends a command of the guest, Ctrl-Z stops one, Ctrl-D ends the shell."""
    run_cat(shell)
    shell.type(b"\x03")
    shell.wait_for(PROMPT)
    run_cat(shell)
    shell.type(b"\x1a")
    shell.wait_for(b"Stopped")
    shell.wait_for(PROMPT)
    shell.type(b"fg\r")
    shell.wait_for(b"cat\r\n")
    shell.type(b"again\r\x04")
    shell.wait_for(b"again\r\nagain\r\n")
    shell.wait_for(PROMPT)
    shell.type(b"\x04")

    assert shell.end() == 0
    assert shell.settings == shell.before


def test_a_new_size_of_the_window_arrives(shell: Screen) -> None:
    """SIGWINCH of the user's terminal becomes one in the guest."""
    loop = b"trap 'stty size' WINCH; echo up; while :; do sleep 0.1; done"
    shell.type(b'bash -c "' + loop + b'"\r')
    shell.wait_for(b"\rup\r\n")
    shell.resize(41, 123)

    shell.wait_for(b"41 123\r\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_gives_the_terminal_back(shell: Screen, number: signal.Signals) -> None:
    """Asked to end, taskvm restores the terminal, ends the guest and exits with 128 + the signal."""
    assert shell.settings != shell.before

    shell.process.send_signal(number)

    assert shell.end() == 128 + number
    assert shell.settings == shell.before
    assert b"Traceback" not in shell.seen


def test_a_lost_guest_gives_the_terminal_back() -> None:
    """When the machine goes down under the shell, the terminal is restored and the error is one line."""
    # Of root: an ordinary account may not power the machine off.
    shell = Screen("shell", *SMALL, "--user", "root")
    shell.wait_for(PROMPT)
    shell.type(b"kill -9 -1; echo o >/proc/sysrq-trigger\r")

    assert shell.end() == 125
    assert shell.settings == shell.before
    shell.close()


def test_a_timeout_gives_the_terminal_back() -> None:
    """--timeout is for shells too."""
    screen = Screen("shell", *SMALL, "--timeout", "2", "--", "sleep", "300")
    status = screen.end()
    restored = screen.settings == screen.before
    screen.close()

    assert status == 124
    assert restored


def test_without_a_terminal_a_shell_says_so() -> None:
    """Nothing is started."""
    done = subprocess.run(
        [TASKVM, "shell", *SMALL], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )

    assert done.returncode == 2
    assert "not a terminal" in done.stderr


def test_a_shell_without_input_ends_by_itself() -> None:
    """As with script(1): nobody will ever type anything."""
    done = subprocess.run(
        [TASKVM, "run", *SMALL, "--tty", "--", "bash"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE_S,
    )

    assert done.returncode == 0, done.stderr


def test_run_gives_a_terminal_when_asked() -> None:
    """--tty works without a terminal on this side; the end of input ends the guest's."""
    command = [TASKVM, "run", *SMALL, "--tty", "--", "sh", "-c", "tty; stty size; cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        # Typed earlier, the terminal would echo it somewhere in these lines.
        told = [run.stdout.readline(), run.stdout.readline()]
        run.stdin.write(b"typed\n")
        run.stdin.close()
        echoed_and_read = run.stdout.read()

    assert told == [b"/dev/pts/0\r\n", b"24 80\r\n"]
    assert echoed_and_read == b"typed\r\ntyped\r\n"
    assert run.returncode == 0
