"""Writing the audit record: a line for an event, appended whole, to a file only its owner reads.

Rule 1: one writer per file (`auditfile`).
Rule 2: no record, no egress: a full or failing log answers False, and the gateway refuses what it
        cannot record.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from taskvm.egress.audit import AuditEvent, Kind, Verdict, render_event, render_time
from taskvm.errors import HostError
from taskvm.net.auditfile import AuditFile

# A guest can cause lines as fast as it likes; this is about a million of them.
MAX_LOG_BYTES = 256 * 1024 * 1024


class AuditLog:
    """Where the events of one sandbox go.

    `write` takes one line, whole; `listener` sees each event.
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        sandbox: str,
        *,
        listener: Callable[[AuditEvent], None] | None = None,
        max_bytes: int = MAX_LOG_BYTES,
    ) -> None:
        self._write = write
        self.sandbox: str = sandbox
        self._listener = listener
        self._room = max_bytes
        self._broken = False
        # What of a host's name is not written down: the guest may put anything into the names that it asks for.
        self.conceal: Callable[[str], str] = str
        self._close: Callable[[], None] = lambda: None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        sandbox: str,
        *,
        listener: Callable[[AuditEvent], None] | None = None,
        max_bytes: int = MAX_LOG_BYTES,
    ) -> AuditLog:
        """Append to the file at `path`, made 0600.

        Raises HostError when it cannot be ours alone.
        """
        file = AuditFile(path)
        log = cls(file.append, sandbox, listener=listener, max_bytes=max_bytes)
        log._close = file.close
        return log

    def record(self, kind: Kind, decision: Verdict, **fields: Any) -> bool:
        """Write one event. False: it is not recorded, and what it allows must not happen.

        `fields` are those of AuditEvent.
        """
        if self._broken:
            return False
        now = render_time(time.time_ns())
        if host := fields.get("host"):
            fields["host"] = self.conceal(host)
        event = AuditEvent(time=now, sandbox=self.sandbox, kind=kind, decision=decision, **fields)
        line = render_event(event)
        if len(line) > self._room:
            self._broken = True
            full = AuditEvent(
                time=now, sandbox=self.sandbox, kind="log", decision="error",
                reason="the audit log is full: nothing leaves this sandbox any more",
            )  # fmt: skip
            event, line = full, render_event(full)
        self._room -= len(line)
        try:
            self._write(line)
        except (OSError, HostError):
            self._broken = True
        if self._listener is not None:
            self._listener(event)
        return not self._broken

    def close(self) -> None:
        """Close the file. Idempotent; later events are not recorded."""
        self._broken = True
        close, self._close = self._close, lambda: None
        close()
