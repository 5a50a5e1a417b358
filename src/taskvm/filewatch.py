"""Changes of the guest's files, as its kernel tells them (inotify): what `Files.watch` opens.

They are the guest's own word, and of its own file system calls: what the host changes in a mounted folder shows when
a program of the guest looks, not here.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from taskvm.errors import GuestError, SandboxLostError
from taskvm.port import StreamReset
from taskvm.vm.control import Call, ControlClosedError
from taskvm.wire.changes import ChangeDecoder, ChangeError, ChangeKind, ChangeRecord

# The agent serves as many watches of one sandbox at a time (guest/control.c).
MAX_WATCHES = 16
_READ_BYTES = 64 * 1024
_CANCELLED = 125  # ECANCELED
_IO_ERROR = 5  # EIO


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChange:
    """One change of a guest file.

    `kind` is "created", "modified" (bytes were written), "written" (a file that was open for writing was closed),
    "attributes" (mode, owner, times, links), "deleted", "moved" (from `old_path` to `path`), or "overflow": more
    changed than was taken, so look at the whole of `path` again.
    """

    kind: ChangeKind
    path: str
    is_dir: bool = False
    old_path: str | None = None


class FileWatch:
    """A running watch: iterate over it with `async for`. Leaving `async with`, or `close`, ends it.

    The iteration ends when the watch or the sandbox is closed, and after the "deleted" of `path` itself. What is not
    taken waits in the guest's kernel, up to 16384 changes; then an "overflow" stands for all that were lost.
    """

    def __init__(self, call: Call, path: str) -> None:
        self.path = path
        self._call = call
        self._decoder = ChangeDecoder()
        self._changes: deque[FileChange] = deque()
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> FileChange:
        """Return the next change.

        Raises SandboxLostError when the sandbox is gone, GuestError when the guest can watch no further (ENOSPC: too
        many directories, fs.inotify.max_user_watches).
        """
        while not self._changes:
            data = b"" if self._closed else await self._read()
            if not data:
                raise StopAsyncIteration
            self._take(data)
        return self._changes.popleft()

    async def close(self) -> None:
        """End the watch; an iteration that waits ends too. Idempotent."""
        if not self._closed:
            self._closed = True
            inlet = self._call.inlets[1]
            self._call.forget(errno=None if inlet.ended else _CANCELLED)
            inlet.feed_end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _read(self) -> bytes:
        try:
            return await self._call.inlets[1].read(_READ_BYTES)
        except ControlClosedError:
            return b""
        except StreamReset as error:
            operation = self._call.operation
            raise GuestError(operation, error.errno or _IO_ERROR, "inotify_add_watch") from error

    def _take(self, data: bytes) -> None:
        try:
            self._changes.extend(self._told(record) for record in self._decoder.feed(data))
        except ChangeError as error:
            operation = self._call.operation
            self._call.fail_port(f"{operation}: {error}")
            raise SandboxLostError(operation, "the guest answered nonsense") from error

    def _told(self, record: ChangeRecord) -> FileChange:
        return FileChange(
            kind=record.kind,
            path=self._whole(record.path),
            is_dir=bool(record.dir),
            old_path=None if record.old is None else self._whole(record.old),
        )

    def _whole(self, below: bytes) -> str:
        return f"{self.path.rstrip('/')}/{os.fsdecode(below)}" if below else self.path
