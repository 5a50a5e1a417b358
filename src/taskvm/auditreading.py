"""Reading audit logs: of the sandboxes of this user, whole or as they grow."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

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
        for line in _lines(newest, follow=follow):
            with contextlib.suppress(msgspec.MsgspecError):
                yield parse_event(line)
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise UsageError(f"read the audit log {newest}", reason) from error


def _lines(newest: Path, *, follow: bool) -> Iterator[bytes]:
    """Yield the whole lines of each part, of those too that begin meanwhile; with `follow`, without end.

    A part gets a number when the next one begins. It keeps that, and nothing more is written to it.
    """
    read = 0  # the number of the last part that was read to its end
    while True:
        part = _part_after(newest, read)
        try:
            file = part.open("rb")
        except FileNotFoundError:
            if part != _part_after(newest, read):
                continue  # it has got its number meanwhile
            if not read:
                raise
            if not follow:
                return
            time.sleep(POLL_S)  # between the two steps of beginning a part
            continue
        with file:
            if part != newest:
                yield from _lines_to_end(file)
                read = _number(part)
            elif _part_after(newest, read) == newest:
                yield from _lines_to_end(file, newest if follow else None)
                if not follow:
                    return
                read = _number_now(newest, file) or read


def _lines_to_end(file: BinaryIO, growing: Path | None = None) -> Iterator[bytes]:
    """Yield the lines to the end of the file; if it grows, to the end that it has when it is at that path no more."""
    cut = b""
    last = False
    while True:
        data = file.readline(MAX_LINE)
        if data.endswith(b"\n") or len(cut) > MAX_LINE:
            yield cut + data
            cut = b""
        elif data:
            cut += data
        elif last:
            return
        else:
            last = growing is None or _has_moved(growing, file)


def _part_after(newest: Path, number: int) -> Path:
    numbered = find_parts(newest)[:-1]
    return next((part for part in numbered if _number(part) > number), newest)


def _number(part: Path) -> int:
    return int(part.suffix[1:])


def _number_now(newest: Path, file: BinaryIO) -> int | None:
    """Return the number that the part has got which was the newest; None when it has been removed."""
    opened = os.fstat(file.fileno())
    for part in find_parts(newest)[:-1]:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(part.stat(), opened):
                return _number(part)
    return None


def _has_moved(newest: Path, file: BinaryIO) -> bool:
    """Say whether the part is the newest no more; wait a while if it is."""
    if moved := _is_moved(newest, file):
        return moved
    time.sleep(POLL_S)
    return False


def _is_moved(newest: Path, file: BinaryIO) -> bool:
    try:
        return not os.path.samestat(newest.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False  # between the two steps of beginning a part
