"""What the host refuses ends the command line with a line and a status (taskvm.cli.group)."""

import subprocess
import sys
from pathlib import Path

TASKVM = Path(sys.executable).with_name("taskvm")


def test_a_working_directory_that_is_gone_is_told(tmp_path: Path) -> None:
    """Somebody removed it, as builds do: no traceback."""
    script = f'mkdir gone && cd gone && rmdir ../gone && exec "{TASKVM}" cp app:/etc/passwd here'
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == "taskvm: No such file or directory\n"
