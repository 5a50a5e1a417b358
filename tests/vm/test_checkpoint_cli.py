"""`taskvm checkpoint` and `run --checkpoint`, as a person uses them. Covers taskvm.cli.checkpoint."""

import json
import subprocess
from pathlib import Path

import pytest
from tests.support.screen import SMALL, TASKVM
from tests.support.waiting import PATIENCE_S

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
    assert (ran, whole) == ("tool\n", "tool\nx\n")
    assert "its memory fits this host" in refused
    assert "it was saved and stopped" in stopped
    assert taskvm("checkpoint", "list") == ""
    assert json.loads(json_listed)[1]["name"] == "whole"
    assert "it is not there" in taskvm("run", "--checkpoint", "base", "--", "true", status=2)
