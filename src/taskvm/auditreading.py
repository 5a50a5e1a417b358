"""Reading audit logs: of the sandboxes of this user, whole or as they grow."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from taskvm.egress.audit import AuditEvent, parse_event
from taskvm.errors import UsageError
from taskvm.net.auditfile import find_parts
from taskvm.paths import state_dir

POLL_S = 0.2
# Our own lines are at most 8 KiB; what is longer was not written by us.
MAX_LINE = 64 * 1024


def find_audit_log(name: str | os.PathLike[str] | None = None) -> Path:
    """Return the audit log of a file's path or a sandbox's id; None: of the newest sandbox.

    Raises UsageError when there is none.
    """
    folder = state_dir() / "audit"
    if name is None:
        logs = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        if not logs:
            raise UsageError("find an audit log", f"there is none in {folder}", "Name a file")
        return logs[-1]
    for path in (Path(name), folder / f"{name}.jsonl"):
        if path.is_file():
            return path
    raise UsageError(f"find the audit log {name}", f"no such file, and no such log in {folder}")


def read_audit(path: str | os.PathLike[str], *, follow: bool = False) -> Iterator[AuditEvent]:
    """Yield the events of an audit log, its older parts first; with `follow`, without end.

    A line that a crash has cut is left out. Raises UsageError when the file cannot be read.
    """
    newest = Path(path)
    try:
        for part in find_parts(newest):
            for line in _lines(part, follow=follow and part == newest):
                with contextlib.suppress(msgspec.MsgspecError):
                    yield parse_event(line)
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise UsageError(f"read the audit log {newest}", reason) from error


def _lines(path: Path, *, follow: bool) -> Iterator[bytes]:
    """Yield the whole lines of a file; with `follow`, of its successors of the same name too."""
    file = path.open("rb")
    try:
        cut = b""
        moved = False
        while True:
            data = file.readline(MAX_LINE)
            if data.endswith(b"\n") or len(cut) > MAX_LINE:
                yield cut + data
                cut = b""
            elif data:
                cut += data
            elif not follow:
                return
            elif moved:  # read to its end after it was moved: nothing more is written to it
                following = _part_after(path, file.fileno())
                file.close()
                file, moved = following.open("rb"), False
            elif not (moved := _is_moved(path, file.fileno())):
                time.sleep(POLL_S)
    finally:
        file.close()


def _part_after(path: Path, descriptor: int) -> Path:
    parts = find_parts(path)
    opened = os.fstat(descriptor)
    same = [part.exists() and os.path.samestat(part.stat(), opened) for part in parts[:-1]]
    return parts[same.index(True) + 1] if True in same else path


def _is_moved(path: Path, descriptor: int) -> bool:
    try:
        return not os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False  # between the two steps of beginning a part
