"""A connection to the user's supervisor: found, started where none runs, and of this version."""

from __future__ import annotations

import asyncio
import os

import taskvm
from taskvm.errors import HostError, SandboxLostError, UsageError
from taskvm.supervisor.place import Place
from taskvm.supervisor.ports import Caller
from taskvm.supervisor.spawn import START_TIMEOUT_S, spawn
from taskvm.wire.supervision import ANY_VERSION

_PAUSE_S = 0.05


class NoneRunsError(UsageError):
    """Raised when there is no supervisor, and the operation starts none."""


async def connect(
    place: Place, operation: str, sandbox: str | None = None, *, starts: bool = False
) -> Caller:
    """Return a connection that has been greeted; with `starts` a supervisor is started where none runs.

    `operation` and the `sandbox` that it is for are what an error names.

    Raises NoneRunsError, and HostError when it does not answer or is of another version.
    """
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while (caller := await _try(place)) is None:
                if starts:
                    await spawn(place)
                elif _is_free(place):
                    raise NoneRunsError(
                        operation if sandbox is None else f"find the sandbox {sandbox!r}",
                        "no sandbox runs that outlives its command line",
                        "Start one: `taskvm start`, `taskvm shell` or `taskvm run --detach`",
                    )
                else:
                    await asyncio.sleep(_PAUSE_S)  # it starts, or ends
    except TimeoutError:
        raise HostError(
            f"connect to the supervisor in {place.directory}",
            f"it does not answer within {START_TIMEOUT_S:g} s",
            f"See {place.log}, or kill it: its sandboxes end with it",
        ) from None
    _check_version(caller, operation)
    return caller


async def _try(place: Place) -> Caller | None:
    sock = place.connect()
    if sock is None:
        return None
    caller = await Caller.open(sock)
    try:
        await asyncio.shield(caller.greeting)
    except SandboxLostError:
        return None  # it was about to end
    except BaseException:
        caller.close()
        raise
    return caller


def _is_free(place: Place) -> bool:
    lock = place.lock()
    if lock is not None:
        os.close(lock)
    return lock is not None


def _check_version(caller: Caller, operation: str) -> None:
    theirs = caller.greeting.result()
    if theirs.version == taskvm.__version__ or operation in ANY_VERSION:
        return
    caller.close()
    raise HostError(
        f"{operation} with taskvm {taskvm.__version__}",
        f"the supervisor that runs is of version {theirs.version} (process {theirs.pid})",
        "`taskvm supervisor stop` ends it and its sandboxes; the next command starts a new one",
    )
