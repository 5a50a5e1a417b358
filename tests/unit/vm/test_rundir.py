"""Directories of running sandboxes: owned by a lock, removed with it or after its owner's death."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taskvm.errors import HostError
from taskvm.vm.rundir import RunDir, run_base, sweep


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TASKVM_CACHE", str(tmp_path))
    return tmp_path


def test_a_directory_is_private_and_removed_by_its_owner() -> None:
    """Nobody else can look in; `remove` leaves nothing and may be called twice."""
    run_dir = RunDir.create("one")
    mode = run_dir.path.stat().st_mode & 0o777
    (run_dir.path / "disk").write_text("x")

    run_dir.remove()
    run_dir.remove()

    assert mode == 0o700
    assert list(run_base().iterdir()) == []


def test_what_a_thread_still_makes_in_it_is_removed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork is about to have its layer when its sandbox is closed: that comes after the look at what there is."""
    run_dir, rmdir = RunDir.create("one"), os.rmdir
    late = [run_dir.path / "layer1.qcow2"]

    def make_and_remove(path: str, *, dir_fd: int | None = None) -> None:
        while late:
            late.pop().touch()
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", make_and_remove)

    run_dir.remove()

    assert late == []
    assert list(run_base().iterdir()) == []


def test_a_sweep_takes_the_dead_and_leaves_the_living() -> None:
    """The directory of a killed process goes; that of a running one stays."""
    living = RunDir.create("living")
    program = (
        "from taskvm.vm.rundir import RunDir; import time\n"
        "RunDir.create('dead'); print('made', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "made\n"
    before = sweep(run_base())
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()

    after = sweep(run_base())

    assert (before, after) == ([], ["dead"])
    assert living.path.is_dir()
    living.remove()


def test_what_a_kill_left_halfway_is_removed() -> None:
    """A directory whose removal was cut short has lost its lock; one that was never finished keeps its dot."""
    base = run_base()
    for name in ("half-removed", ".unfinished", ".being-made"):
        (base / name).mkdir()
        (base / name / "disk.qcow2").write_text("gigabytes")
    os.utime(base / ".unfinished", (1, 1))

    removed = sweep(base)

    assert removed == ["half-removed"]
    assert [path.name for path in base.iterdir()] == [".being-made"]


def test_a_directory_that_cannot_be_made_is_a_host_error(cache: Path) -> None:
    """The error names the directory and the cause."""
    (run_base() / ".one").write_text("in the way")

    with pytest.raises(HostError, match="File exists"):
        RunDir.create("one")
