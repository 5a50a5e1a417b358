"""The file of an audit record: lines appended whole, ours alone, moved aside when it is long enough.

`audit.jsonl` is the newest part; `audit.jsonl.1` is the oldest, higher numbers are newer. A part is
never removed while its sandbox runs: a guest that makes many lines cannot push out what it did.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from taskvm.errors import HostError

# A part opens in an editor, and compresses to about 1 MiB.
PART_BYTES = 32 * 1024 * 1024
# Of earlier sandboxes that wrote to the same file.
KEPT_PARTS = 8


class AuditFile:
    """Appends lines to the file at `path`, made 0600 and locked for as long as it is open."""

    def __init__(self, path: str | os.PathLike[str], *, part_bytes: int = PART_BYTES) -> None:
        """Raises HostError when it cannot be ours alone."""
        self._path = Path(path)
        self._part_bytes = part_bytes
        self._descriptor = _open(self._path)
        self._size = os.fstat(self._descriptor).st_size
        for old in find_parts(self._path)[:-1][:-KEPT_PARTS]:
            old.unlink(missing_ok=True)

    def append(self, line: bytes) -> None:
        """Write one line whole. Raises OSError, HostError when that cannot be done."""
        if self._size and self._size + len(line) > self._part_bytes:
            self._begin_part()
        if os.write(self._descriptor, line) != len(line):
            raise OSError("the audit log took only a part of a line (the disk is full)")
        self._size += len(line)

    def close(self) -> None:
        """Close the file and let others have it."""
        os.close(self._descriptor)

    def _begin_part(self) -> None:
        parts = find_parts(self._path)[:-1]
        number = int(parts[-1].suffix[1:]) + 1 if parts else 1
        self._path.rename(f"{self._path}.{number}")
        old, self._descriptor, self._size = self._descriptor, _open(self._path), 0
        os.close(old)


def find_parts(path: Path) -> list[Path]:
    """Return the parts of an audit log from the oldest to the newest, which is `path` itself."""
    numbered = [part for part in path.parent.glob(f"{path.name}.*") if part.suffix[1:].isdecimal()]
    own = [part for part in numbered if part.name == f"{path.name}{part.suffix}"]
    return [*sorted(own, key=lambda part: int(part.suffix[1:])), path]


def _open(path: Path) -> int:
    operation = f"open the audit log {path}"
    try:
        # O_NOFOLLOW: a link planted at the path must not choose the file.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise HostError(operation, error.strerror or "it cannot be opened") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise HostError(operation, "it is not a regular file")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(descriptor, 0o600)
    except BlockingIOError as error:
        os.close(descriptor)
        raise HostError(operation, "another sandbox writes to it", "Use another file") from error
    except (OSError, HostError):
        os.close(descriptor)
        raise
    return descriptor
