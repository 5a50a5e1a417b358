"""tests/support/kernel_mount.py: a test run that is killed leaves neither a mount nor a process that waits for ever."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.support.kernel_mount import need_private_mounts
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent.parent.parent
_STUCK = """
import os, sys, threading
from pathlib import Path
from tests.support.kernel_mount import KernelMount
from taskvm.fs.memory import Memory

class Stuck(Memory):
    def opened(self):
        return self
    def lookup(self, parent, name):
        print("waiting", flush=True)
        threading.Event().wait()

KernelMount(Stuck(), Path(sys.argv[1]))
os.stat(sys.argv[1] + "/file")
"""


def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
    """Its main thread waits in the kernel for its own server, which is never going to answer."""
    need_private_mounts()
    program = [sys.executable, "-c", _STUCK, str(tmp_path / "mount")]
    with subprocess.Popen(program, stdout=subprocess.PIPE, cwd=ROOT) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"waiting\n"
        run.kill()
        assert run.wait(PATIENCE_S) == -signal.SIGKILL
