"""taskvm.room: the limit of open files is raised when it is needed, and its end is an error with a reason.

Each claim runs in a process of its own, whose limits it may change.
"""

import subprocess
import sys

from tests.support.waiting import PATIENCE_S

PROLOGUE = """
import contextlib, os, resource
from taskvm.errors import HostError
from taskvm.room import keep_room, room_for_one
def soft(): return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
"""


def said(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + program],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_limit_stays_while_there_is_room_and_is_raised_when_there_is_none() -> None:
    program = """
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 1000))
with room_for_one():
    print(soft())
files = [os.open("/dev/null", os.O_RDONLY) for n in range(80)]
with room_for_one():
    print(soft() >= len(os.listdir("/proc/self/fd")) + 32)
"""

    assert said(program).split() == ["100", "True"]


def test_starts_at_the_same_time_find_room_for_all() -> None:
    program = """
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 5000))
with contextlib.ExitStack() as stack:
    for n in range(50):
        stack.enter_context(room_for_one())
    print(soft() >= 50 * 32)
"""

    assert said(program) == "True"


def test_the_end_of_all_room_is_an_error_that_says_what_to_raise() -> None:
    program = """
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
files = [os.open("/dev/null", os.O_RDONLY) for n in range(40)]
try:
    with room_for_one():
        print("room")
except HostError as error:
    print(error)
"""

    assert "files open, of at most 60. Raise its limit" in said(program)


def test_the_limit_is_raised_before_connections_meet_it_and_its_end_is_kept_free() -> None:
    program = """
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
files, kept = [], True
while kept:
    files.append(os.open("/dev/null", os.O_RDONLY))
    kept = keep_room(files[-1])
print(files[-1] == 300 - 64, soft())
"""

    assert said(program) == "True 300"
