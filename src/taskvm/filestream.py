"""The content of guest files in pieces, either way: what is larger than memory passes through a window of credit.

A guest that makes no progress for PATIENCE_S is taken for dead; a slow source or reader on the host is not its fault.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterable, AsyncIterator

from taskvm.errors import GuestError, SandboxLostError
from taskvm.port import StreamReset
from taskvm.vm.control import Call
from taskvm.wire.control import Written

# The longest that a guest may need for one piece: an fsync of a large file on a slow disk is one, too.
PATIENCE_S = 300.0
PIECE_BYTES = 256 * 1024
_EIO = 5


async def receive(call: Call, operation: str) -> AsyncIterator[bytes]:
    """Yield what comes on channel 1, to its end. Raises GuestError when the guest cannot go on, SandboxLostError."""
    while True:
        try:
            async with asyncio.timeout(PATIENCE_S):
                data = await call.inlets[1].read(PIECE_BYTES)
        except StreamReset as error:
            raise GuestError(operation, error.errno or _EIO, "read") from error
        except TimeoutError:
            raise _stuck(operation) from None
        if not data:
            return
        yield data


async def send(call: Call, pieces: AsyncIterable[bytes], operation: str) -> None:
    """Send `pieces` and wait until the guest says that it has written them all.

    Raises GuestError when it refuses, as soon as it does; SandboxLostError; and what `pieces` raises.
    """
    try:
        async with asyncio.timeout(None) as patience, asyncio.TaskGroup() as group:
            feeding = group.create_task(_feed(call, pieces, patience))
            written = await call.answer(Written, math.inf)
            feeding.cancel()  # it has ended, unless the guest lies
    except TimeoutError:
        raise _stuck(operation) from None
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    if feeding.cancelled() or written.size != feeding.result():
        raise SandboxLostError(operation, f"the guest wrote {written.size} bytes, not all of them")


async def _feed(call: Call, pieces: AsyncIterable[bytes], patience: asyncio.Timeout) -> int:
    """Send `pieces` and the end. `patience` runs only while the guest is waited for. Returns how many bytes."""
    loop = asyncio.get_running_loop()
    size = 0
    async for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), PIECE_BYTES):
            patience.reschedule(loop.time() + PATIENCE_S)
            try:
                await call.outlet.write(view[start : start + PIECE_BYTES])
            except (BrokenPipeError, StreamReset):
                return size  # the guest has answered before it read everything: its answer says why
        patience.reschedule(None)
        size += len(view)
    call.outlet.end()
    patience.reschedule(loop.time() + PATIENCE_S)
    return size


def _stuck(operation: str) -> SandboxLostError:
    return SandboxLostError(
        operation,
        f"the guest made no progress for {PATIENCE_S:.0f} s",
        "Close the sandbox and start another",
    )
