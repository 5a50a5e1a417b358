"""Changes under review on the command line (taskvm.cli.review, taskvm.cli.run)."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.screen import SMALL, TASKVM, Screen
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.vm

SCRIPT = "echo more >> note; echo new > made; rm old; printf '[alias]\\n' >> .git/config; exit 3"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / ".git").mkdir(parents=True)
    (root / ".git" / "config").write_text("[core]\n")
    (root / "note").write_text("text\n")
    (root / "old").write_text("old\n")
    return root


@pytest.fixture
def screens() -> Iterator[list[Screen]]:
    made: list[Screen] = []
    yield made
    for screen in made:
        screen.close()


def arguments(project: Path, *options: str, script: str = SCRIPT) -> list[str]:
    mount = f"{project}:/workspace:review"
    return ["run", *SMALL, "--mount", mount, *options, "--", "sh", "-c", script]


def taskvm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TASKVM, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
    )


def names(project: Path) -> list[str]:
    return sorted(path.name for path in project.iterdir())


def test_a_patch_is_written_and_nothing_else(project: Path) -> None:
    """--diff FILE: git takes it, and the project is as it was; the status is the command's."""
    patch = project.parent / "changes.patch"

    done = taskvm(*arguments(project, "--diff", str(patch)))

    assert done.returncode == 3
    assert "1 added, 1 deleted, 2 modified" in done.stderr
    assert names(project) == [".git", "note", "old"]
    git = ["git", "apply", "--exclude=.git/*", str(patch)]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(project.parent)}
    (project / ".git" / "config").unlink()  # it is no repository, and git would look into it
    (project / ".git").rmdir()
    subprocess.run(git, cwd=project, env=environment, check=True)
    assert names(project) == ["made", "note"]
    assert (project / "note").read_text() == "text\nmore\n"


def test_a_patch_that_cannot_be_written_is_kept_elsewhere(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sandbox has gone by then, and nothing of its work would be left. A directory is refused before it begins."""
    spare = project.parent / "spare"
    spare.mkdir()
    monkeypatch.setenv("TMPDIR", str(spare))

    refused = taskvm(*arguments(project, "--diff", str(spare)))
    done = taskvm(*arguments(project, "--diff", "/dev/full", script="echo new > made"))

    assert (refused.returncode, done.returncode) == (2, 125)
    assert "it is a directory" in refused.stderr
    assert "write the patch /dev/full: No space left on device" in done.stderr
    [patch] = spare.iterdir()
    assert f"the patch is in {patch}" in done.stderr
    assert "+new" in patch.read_text()
    assert patch.stat().st_mode & 0o777 == 0o600


def test_all_is_applied_but_what_the_host_would_obey(project: Path) -> None:
    """--apply all: the status says that something was left, when the command itself was content."""
    script = SCRIPT.replace("exit 3", "exit 0")

    done = taskvm(*arguments(project, "--apply", "all", script=script))

    assert done.returncode == 125
    assert "applied 3 of 4 changes" in done.stderr
    assert ".git/config: git obeys it" in done.stderr
    assert names(project) == [".git", "made", "note"]
    assert (project / ".git" / "config").read_text() == "[core]\n"


def test_a_person_is_asked(project: Path, screens: list[Screen]) -> None:
    """The diff on request, then yes; what git would obey is asked for by itself."""
    screen = Screen(*arguments(project))
    screens.append(screen)

    screen.wait_for(b"show the [d]iff")
    screen.type(b"d\n")
    screen.wait_for(b"+more")
    screen.wait_for(b"show the [d]iff")
    screen.type(b"y\n")
    screen.wait_for(b"apply these too?")
    screen.type(b"n\n")

    screen.wait_for(b"applied 3 of 4 changes")
    assert screen.end() == 3
    assert names(project) == [".git", "made", "note"]
    assert (project / ".git" / "config").read_text() == "[core]\n"


def test_a_person_says_no(project: Path, screens: list[Screen]) -> None:
    screen = Screen(*arguments(project))
    screens.append(screen)

    screen.wait_for(b"show the [d]iff")
    screen.type(b"n\n")

    assert screen.end() == 3
    assert names(project) == [".git", "note", "old"]


def test_names_and_contents_do_not_reach_the_terminal_as_they_are(
    project: Path, screens: list[Screen]
) -> None:
    """A guest that writes escape sequences cannot paint over the list of what it did."""
    script = r"printf 'a\033[2Jb' > \"$(printf 'x\033[2Jy\nz')\""
    screen = Screen(*arguments(project, script=script.replace('\\"', '"')))
    screens.append(screen)

    screen.wait_for(b"x\\x1b[2Jy\\nz")
    screen.wait_for(b"show the [d]iff")
    screen.type(b"d\n")
    screen.wait_for(b"+a\\x1b[2Jb")
    screen.type(b"n\n")
    screen.end()

    assert b"\x1b[2J" not in screen.seen


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "there is no terminal to ask on"),
        (["--apply", "ask"], "there is no terminal"),
        (["--diff", "/nowhere/at/all"], "its directory does not exist"),
        (["--detach"], "nobody would look at the changes"),
    ],
)
def test_changes_are_not_lost_without_a_word(
    project: Path, options: list[str], reason: str
) -> None:
    """Refused before anything starts."""
    words = arguments(project, *options)
    if options == ["--detach"]:
        words = arguments(project, "--detach", "--apply", "none")

    done = taskvm(*words)

    assert done.returncode == 2
    assert reason in done.stderr


def test_the_options_of_a_review_need_one() -> None:
    done = taskvm("run", *SMALL, "--apply", "all", "--", "true")

    assert done.returncode == 2
    assert "no directory is mounted for review" in done.stderr
