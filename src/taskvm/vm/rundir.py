"""The private directory of one running sandbox, and the removal of those whose owner died.

A directory belongs to the process that holds the lock on its file `lock`. The kernel drops the lock when the owner ends
in any way, so a directory whose lock can be taken is left over (QEMU itself is ended by its supervisor's lifeline).
What the sandbox was started from, its image and template, is held for as long.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from taskvm.errors import HostError
from taskvm.paths import cache_dir, hold, private_dir

_LOCK = "lock"
# A thread of a fork or a checkpoint that its sandbox's end has met may just have made one more file in its directory.
_ATTEMPTS = 8
# Between making a directory and renaming it lie microseconds; a host may have been asleep in between.
UNFINISHED_AGE_S = 3600.0


class RunDir:
    """A locked directory for one sandbox's files; `remove` deletes it. Make one with `create`."""

    def __init__(self, path: Path, lock: int, holds: contextlib.ExitStack) -> None:
        self.path = path
        self._lock: int | None = lock
        self._holds = holds

    @classmethod
    def create(cls, name: str, *, using: Sequence[Path] = ()) -> RunDir:
        """Make and lock the directory `name`, after sweeping what dead owners left, and hold the directories `using`.

        Raises HostError, also when one of `using` is gone.
        """
        with contextlib.ExitStack() as holds:
            for path in using:
                holds.callback(os.close, hold(path))
            path, lock = cls._make(name)
            return cls(path, lock, holds.pop_all())

    @staticmethod
    def _make(name: str) -> tuple[Path, int]:
        base = run_base()
        sweep(base)
        # Made under another name: a sweep by a neighbour must not see it before it is locked.
        staging = base / f".{name}"
        try:
            staging.mkdir(mode=0o700)
            lock = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            staging.rename(base / name)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise HostError(
                f"make the directory {base / name}", error.strerror or str(error), "Free disk space"
            ) from error
        return base / name, lock

    def remove(self) -> None:
        """Delete the directory and drop the lock. Idempotent."""
        if self._lock is not None:
            for _ in range(_ATTEMPTS):
                shutil.rmtree(self.path, ignore_errors=True)
                if not self.path.exists():
                    break
            os.close(self._lock)
            self._lock = None
            self._holds.close()


def run_base() -> Path:
    """Return the directory that holds the directories of all running sandboxes of this user."""
    return private_dir(cache_dir() / "run")


def sweep(base: Path) -> list[str]:
    """Remove the directories below `base` whose owner is gone; return their names."""
    removed = []
    for path in base.iterdir():
        if path.name.startswith("."):
            _remove_unfinished(path)
        elif path.is_dir() and _is_left_over(path):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
    return removed


def _is_left_over(path: Path) -> bool:
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # it came here with its lock: whoever was removing it was killed halfway
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _remove_unfinished(path: Path) -> None:
    """Remove what a process that was killed in `create` left; a living one takes no time at all for that."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat(follow_symlinks=False).st_mtime > UNFINISHED_AGE_S:
            shutil.rmtree(path, ignore_errors=True)
