"""What a tool may do to the place it acts in: files and commands, and nothing else.

A tool knows no host and no guest. It is handed an `Operations` and uses that, so whoever replaces
the operations moves all tools at once, and no tool can be left behind on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

EntryKind = Literal["file", "dir", "symlink", "other"]

# Takes a piece of a command's output; False says: enough, end the command.
OutputSink = Callable[[bytes], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a path is. `kind` is never `symlink` for a path that was followed."""

    name: str
    kind: EntryKind
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a command ended: `exit_code` is 128 + n after signal n."""

    exit_code: int
    timed_out: bool = False
    stopped: bool = False  # the output's reader had enough


class Operations(Protocol):
    """Files and commands of one place. Paths are absolute and its own.

    Everything raises OperationError for a refusal, and EnvironmentLost when the place is gone.
    """

    async def read_bytes(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return a file's content, or `length` bytes of it from `offset` on."""
        ...

    async def write_bytes(self, path: str, data: bytes) -> None:
        """Replace a file's content, keeping its mode; make the directories above it."""
        ...

    async def stat(self, path: str) -> Entry:
        """Return what `path` is, following symbolic links."""
        ...

    async def list(self, path: str) -> Sequence[Entry]:
        """Return the entries of a directory, in any order, symbolic links not followed."""
        ...

    async def mkdir(self, path: str) -> None:
        """Make a directory and those above it; one that exists is no error."""
        ...

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        cwd: str,
        on_output: OutputSink,
        timeout_s: float | None = None,
    ) -> Ending:
        """Run argv, or a text in bash, with no input and both outputs merged.

        Everything the command has started is killed on timeout, on cancellation and when the sink
        has enough.
        """
        ...
