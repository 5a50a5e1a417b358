"""Starting the supervisor when a command needs one: once, whoever else needs it at the same moment.

Who gets the lock starts it, and hands the lock over to it; the others wait until it answers. It is nobody's child,
leads a session of its own, so that no terminal's end reaches it, and has of its starter's environment what it needs: a
variable with a secret is not there to be read in /proc for as long as it lives.
"""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping

from taskvm.errors import HostError
from taskvm.interruption import CHECK_INTERVAL_S, check, in_thread
from taskvm.paths import cache_path
from taskvm.supervisor.place import RUNTIME_VARIABLE, Place

# It imports a few modules and binds a socket: half a second, more on a busy machine.
START_TIMEOUT_S = 30.0
READY = b"ready\n"
_KEPT = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV",
        "SSL_CERT_FILE", "SSL_CERT_DIR", "http_proxy", "https_proxy", "no_proxy",
        "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    }
)  # fmt: skip
_KEPT_PREFIXES = ("TASKVM_", "XDG_", "LC_", "PYTHON")


async def spawn(place: Place) -> None:
    """Start the supervisor of `place` unless somebody has; returns when it answers, or is about to.

    Raises HostError when it does not start.
    """
    lock = place.lock()
    if lock is None:
        await asyncio.sleep(0.05)  # it lives, or somebody starts it
        return
    try:
        # It passes the lock on, whose number must not be another file by then.
        await in_thread(_start, place, lock)
    finally:
        os.close(lock)


def _start(place: Place, lock: int) -> None:
    reading, writing = os.pipe()
    descriptors = ("--lock", str(lock), "--ready", str(writing))
    command = [sys.executable, "-P", "-m", "taskvm.cli", "supervisor", "run", *descriptors]
    try:
        with open(place.log, "ab") as log:
            # Returns at once: it forks, so that it is not this program's child.
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment(os.environ) | _places(place),
                pass_fds=(lock, writing),
                start_new_session=True,
                check=False,
            )
        os.close(writing)
        writing = -1
        ready = _is_told(reading)
        if not ready or os.read(reading, len(READY)) != READY:
            cause = "it ended at once" if ready else f"it is not ready after {START_TIMEOUT_S:g} s"
            raise HostError("start the supervisor", cause, f"See {place.log}")
    except OSError as error:
        raise HostError("start the supervisor", error.strerror or str(error)) from error
    finally:
        os.close(reading)
        if writing != -1:
            os.close(writing)


def _is_told(reading: int) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        check()
        if select.select([reading], [], [], CHECK_INTERVAL_S)[0]:
            return True
    return False


def _places(place: Place) -> dict[str, str]:
    # A relative path would mean another directory in its working directory.
    return {RUNTIME_VARIABLE: str(place.directory), "TASKVM_CACHE": str(cache_path())}


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return what the supervisor gets of an environment."""
    return {
        name: value
        for name, value in own.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }
