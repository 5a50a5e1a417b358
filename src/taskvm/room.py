"""Room in this process for one more sandbox: each holds 16 descriptors, and the usual limit of 1024 ends at 61.

The limit that a process may raise by itself (getrlimit(2), the soft one) is raised when it is needed and not before, as
other runtimes do at once: what a program starts later inherits it. Beyond the hard one the start fails with a reason.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import threading
from collections.abc import Iterator

from taskvm.errors import HostError

# What one start holds at its height: sockets, pipes, the image, the template, the audit log.
DESCRIPTORS = 32
# Left free for what must not fail because a guest has many connections: logs, disks, other starts.
RESERVE = 64
_starting: set[int] = set()
_numbers = itertools.count()
_raising = threading.Lock()


@contextlib.contextmanager
def room_for_one() -> Iterator[None]:
    """Make sure that a start finds descriptors, beside the others that are under way. Raises HostError.

    What stays open is counted as open when the block is left.
    """
    number = next(_numbers)
    _starting.add(number)
    try:
        _make_room(len(_starting) * DESCRIPTORS)
        yield
    finally:
        _starting.discard(number)


def keep_room(descriptor: int) -> bool:
    """Raise the limit when a descriptor that was just opened is near it; False: it must be closed again.

    The kernel gives the lowest free number, so it tells how many there are.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptor >= hard - RESERVE:
        return False
    if descriptor >= soft - RESERVE:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * soft, hard), hard))
    return True


def _make_room(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - numbers, not paths
    if used + wanted <= soft:
        return
    if used + wanted > hard:
        raise HostError(
            "start a sandbox",
            f"this process has {used} files open, of at most {hard}",
            "Raise its limit of open files (`ulimit -Hn`, LimitNOFILE= of systemd), or close sandboxes",
        )
    raise_limit(2 * (used + wanted))


def raise_limit(wanted: int) -> None:
    """Let this process open so many files, or as many as it may by itself. From any thread; nothing is ever lowered."""
    if wanted <= resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        return
    with _raising:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))
