"""Changes of the guest's files, for programs that block."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from taskvm import filewatch as aio
from taskvm.filewatch import FileChange
from taskvm.sync.bridge import Bridge


class FileWatch:
    """A running watch: iterate over it. Leaving `with`, or `close` in another thread, ends it.

    The iteration ends when the watch or the sandbox is closed, and after the "deleted" of `path` itself. What is not
    taken waits in the guest's kernel, up to 16384 changes; then an "overflow" stands for all that were lost.
    """

    def __init__(self, bridge: Bridge, watch: aio.FileWatch) -> None:
        self._bridge = bridge
        self._watch = watch
        self.path: str = watch.path

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FileChange:
        """Return the next change.

        Raises SandboxLostError when the sandbox is gone, GuestError when the guest can watch no further (ENOSPC: too
        many directories, fs.inotify.max_user_watches).
        """
        try:
            return self._bridge.call(self._watch.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """End the watch; an iteration that waits ends too. Idempotent."""
        self._bridge.release(self._watch.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
