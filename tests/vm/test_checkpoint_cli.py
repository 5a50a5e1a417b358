"""`taskvm checkpoint` and `run --checkpoint`, as a person uses them. Covers taskvm.cli.checkpoint."""

import json
import subprocess
from pathlib import Path

import pytest
from tests.support.screen import SMALL, TASKVM
from tests.support.waiting import PATIENCE_S

from taskvm import CheckpointStore

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("runtime")]


def taskvm(*arguments: str, status: int = 0) -> str:
    # A checkpoint of a disk is booted at its first start.
    limit_s = 2.5 * PATIENCE_S
    done = subprocess.run([TASKVM, *arguments], capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_a_sandbox_is_saved_listed_carried_and_started_from(tmp_path: Path) -> None:
    """The whole life of a checkpoint, with memory and without."""
    taskvm("start", *SMALL, "--name", "source")
    taskvm("exec", "source", "--", "sh", "-c", "echo tool > /var/tmp/tool; echo x > /dev/shm/x")
    try:
        taskvm("checkpoint", "create", "source", "base")
        path = taskvm("checkpoint", "create", "--memory", "--stop", "source", "whole").strip()
        listed = taskvm("checkpoint", "list")
        json_listed = taskvm("checkpoint", "list", "--json")
        shown = json.loads(taskvm("checkpoint", "show", "whole"))
        ran = taskvm("run", *SMALL, "--checkpoint", "base", "--", "cat", "/var/tmp/tool")
        whole = taskvm("run", "--checkpoint", "whole", "--", "cat", "/var/tmp/tool", "/dev/shm/x")
        other = taskvm("run", "--checkpoint", "whole", "--memory=128", "--", "true", status=2)
        taskvm("checkpoint", "export", "base", str(tmp_path / "base.qcow2"))
        taskvm("checkpoint", "import", str(tmp_path / "base.qcow2"), "again")
        refused = taskvm("checkpoint", "export", "whole", str(tmp_path / "w"), status=125)
        stopped = taskvm("exec", "source", "--", "true", status=125)
    finally:
        taskvm("checkpoint", "rm", "base", "whole", "again")

    assert [line.split()[:2] for line in listed.splitlines()] == [
        ["NAME", "SAVED"],
        ["base", "disk"],
        ["whole", "memory"],
    ]
    assert (shown["memory"], shown["path"], shown["memory_mib"]) == (True, path, 256)
    assert len(shown["sha256"]) == 64
    assert shown["qemu_version"][0].isdecimal()
    assert (ran, whole) == ("tool\n", "tool\nx\n")
    assert "use its disk" in other
    assert "its memory fits this host" in refused
    assert "it was saved and stopped" in stopped
    assert taskvm("checkpoint", "list") == ""
    assert json.loads(json_listed)[1]["name"] == "whole"
    assert "it is not there" in taskvm("run", "--checkpoint", "base", "--", "true", status=2)


def test_what_cannot_be_used_is_listed_with_the_reason() -> None:
    """It takes room, and nobody would know what to remove: a torn file, and memory without its seal."""
    root = CheckpointStore().root
    (root / "torn").write_bytes(b"half of a disk")
    (root / "empty").mkdir()
    stray = (
        root / "torn (copy)"
    )  # of somebody's file manager: no name, and no reason to list nothing
    stray.touch()
    try:
        listed = subprocess.run([TASKVM, "checkpoint", "list"], capture_output=True, text=True)
        as_json = subprocess.run(
            [TASKVM, "checkpoint", "list", "--json"], capture_output=True, text=True
        )
    finally:
        taskvm("checkpoint", "rm", "torn", "empty")
        stray.unlink()

    assert (listed.returncode, as_json.returncode) == (1, 1)
    assert "torn  DAMAGED  it does not end like a checkpoint" in listed.stdout
    assert "empty  DAMAGED  No such file or directory" in listed.stdout
    assert [each["name"] for each in json.loads(as_json.stdout)] == ["empty", "torn"]
    assert taskvm("checkpoint", "list") == ""
