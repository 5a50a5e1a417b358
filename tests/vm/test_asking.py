"""`taskvm run --ask` on a real terminal (taskvm.cli.asking): who is asked, and what cannot answer for them."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.servers import Seen, http_server
from tests.support.screen import SMALL, TASKVM, Screen
from tests.support.waiting import PATIENCE_S

from taskvm import Question
from taskvm.cli.asking import Asker

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("runtime")]
QUESTION = b"taskvm: the sandbox asks for "


@pytest.fixture
def server() -> Iterator[Seen]:
    with http_server() as seen:
        yield seen


def ask(server: Seen, script: str, *options: str) -> Screen:
    """Run a script of the guest, in which @ is the server's port, on a terminal."""
    names = [f"--resolve={name}.test=127.0.0.1" for name in ("one", "two")]
    inside = f"--allow-address=127.0.0.1:{server.port}"
    command = script.replace("@", str(server.port))
    return Screen("run", *SMALL, "--ask", *names, inside, *options, "--", "sh", "-c", command)


def test_the_user_allows_denies_and_is_asked_once_for_a_sandbox(server: Seen) -> None:
    """A host that was allowed for the sandbox's life is not asked about again; the record of the server agrees."""
    get = "curl -sS -m 200 -o /dev/null -w '%{http_code}\\n'"
    screen = ask(
        server,
        f"{get} http://one.test:@/a; {get} http://one.test:@/b; {get} http://two.test:@/c; echo over",
    )
    try:
        screen.wait_for(QUESTION + b"one.test:%d\r\n" % server.port)
        screen.wait_for(b"GET http /a")
        screen.wait_for(b"eny")
        screen.type(b"what?\n")
        screen.wait_for(b"type o, s or d")
        screen.type(b"sandbox\n")
        screen.wait_for(b"200\r\n")
        screen.wait_for(b"200\r\n")
        screen.wait_for(QUESTION + b"two.test:%d" % server.port)
        screen.type(b"d\n")
        screen.wait_for(b"403\r\n")
        screen.wait_for(b"over\r\n")
        assert screen.end() == 0
    finally:
        screen.close()

    assert [request[1] for request in server.requests] == ["/a", "/b"]


def test_the_guest_answers_nothing_and_hides_nothing(server: Seen, tmp_path: Path) -> None:
    """What was typed to a question that the guest has made up is no answer to the real one, and while that stands the
    guest writes nothing. The keys are not the guest's either.
    """
    fake = "printf 'taskvm: the sandbox asks for good.test:443'; until [ -e go ]; do sleep 0.1; done; cat; "
    paint = "(until [ -e asked ]; do sleep 0.1; done; echo PAINTED; touch painted) & "
    real = "curl -gsS -m 200 -o /dev/null 'http://two.test:@/%1b[2Jx'; wait"
    screen = ask(server, fake + paint + real, "--mount", f"{tmp_path}:/workspace")
    try:
        screen.wait_for(QUESTION + b"good.test:443")
        screen.type(b"sandbox\n")
        screen.wait_for(b"sandbox\r\n")
        (tmp_path / "go").touch()
        screen.wait_for(b"\x1b[!p\r\n" + QUESTION + b"two.test")
        screen.wait_for(b"/%1b[2Jx\r\n")
        (tmp_path / "asked").touch()
        while not (tmp_path / "painted").exists():
            time.sleep(0.05)
        screen.type(b"deny\n")
        screen.wait_for(b"eny (120 s): deny\r\n")
        screen.wait_for(b"PAINTED")
        assert screen.end() == 0
    finally:
        screen.close()

    assert server.requests == []


def test_a_user_who_goes_away_has_not_said_yes(server: Seen) -> None:
    """Ctrl-D at the question."""
    screen = ask(server, "curl -sS -m 200 http://one.test:@/; echo over")
    try:
        screen.wait_for(b"eny (120 s): ")
        screen.type(b"\x04")
        screen.wait_for(b"a person refused this host")
        screen.wait_for(b"over\r\n")
    finally:
        screen.close()

    assert server.requests == []


@pytest.mark.parametrize("option", ["--tty", "--detach"])
def test_it_needs_the_terminal(option: str) -> None:
    """Without one, or where the guest has it, it is refused before anything starts."""
    done = subprocess.run(
        [TASKVM, "run", "--ask", option, "--", "true"],
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    alone = subprocess.run(
        [TASKVM, "run", "--ask", "--", "true"],
        capture_output=True, text=True, timeout=PATIENCE_S, start_new_session=True,
    )  # fmt: skip

    assert done.returncode == 2
    assert f"use --ask with {option}" in done.stderr
    assert alone.returncode == 2
    assert "there is no terminal to ask on" in alone.stderr


def test_what_the_guest_chose_is_shown_escaped_and_cut() -> None:
    """A path with control characters of either kind, and of any length."""
    question = Question("box", "one.test", 80, "http", "G\x1bET", "/\x1b[2J\x9b31m" + "x" * 5000)

    shown = Asker()._render(question)

    assert all(sign.isprintable() or sign == "\n" for sign in shown)
    assert "/\\x1b[2J\\x9b31m" in shown
    assert len(shown) < 500
