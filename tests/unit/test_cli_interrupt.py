"""Ctrl-C at the program's first moment, while it is still being imported (taskvm.cli)."""

import signal
import subprocess
import sys

from tests.support.waiting import PATIENCE_S

# The signal comes when the library of the command line is looked for.
INTERRUPTED = """
import os, signal, sys

class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupter())
sys.argv = ["taskvm", "--version"]
from taskvm.cli import main
main()
"""


def _run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_it_ends_by_the_signal_and_says_nothing() -> None:
    """A shell shows the status 130, and knows that the program was interrupted."""
    done = _run(INTERRUPTED)

    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_who_ignores_the_signal_goes_on() -> None:
    """As `taskvm … &` in a script, which a shell starts with SIGINT ignored."""
    done = _run("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + INTERRUPTED)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("taskvm, version")


def test_an_import_of_the_package_leaves_signals_alone() -> None:
    """Programs that embed the command line keep their handler."""
    done = _run(
        "import signal, taskvm.cli; "
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )

    assert done.stdout == "True\n"
