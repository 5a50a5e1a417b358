"""Work done by an ordinary user of the host, so that tests that root runs see the host's refusals as well."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.support.waiting import PATIENCE_S

NOBODY = 65534
_PR_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None, use_errno=True)


def as_ordinary_user(work: Callable[[], object]) -> object:
    """Return what `work` does: a value of JSON, or how it failed.

    Root's tests do it in a fork of this process that has become nobody; those of anybody else do it as they are.
    """
    if os.geteuid() != 0:
        return work()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _become_nobody()
            try:
                said = json.dumps({"result": work()})
            except BaseException as error:  # noqa: BLE001 - it is told
                said = json.dumps({"error": f"{type(error).__name__}: {error}"})
            with os.fdopen(writing, "w") as output:
                output.write(said)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        told = json.loads(answer.read() or '{"error": "it ended without a word"}')
    os.waitpid(child, 0)
    assert "error" not in told, told["error"]
    return told["result"]


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    # Who has changed users may not look into its own /proc, which an ordinary program may.
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    _libc.alarm(int(PATIENCE_S))  # a fork that hangs would hold up the test for ever


def give(path: Path) -> None:
    """Let what is at `path` belong to who does the work."""
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
