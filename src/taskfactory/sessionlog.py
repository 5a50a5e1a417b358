"""The record of one session on the host: every event as a line of JSON, beside the sandbox's audit log."""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from taskfactory.events import AnyEvent, ToolUpdate, to_json

_ODD = re.compile(r"[^A-Za-z0-9._-]+")


class SessionLog:
    """A directory of its own under the Task Factory's home, readable by the user only."""

    def __init__(self, home: Path, task_id: str) -> None:
        # The id comes from a file that an agent may have written: it names no other directory.
        name = _ODD.sub("-", task_id).strip(".-")[:64] or "task"
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self.directory = home / "sessions" / f"{stamp}-{name}-{secrets.token_hex(3)}"
        self.directory.mkdir(parents=True, mode=0o700)
        self.events_path = self.directory / "events.jsonl"
        self.audit_path = self.directory / "audit.jsonl"
        self._file = self.events_path.open("xb")

    def write(self, event: AnyEvent) -> None:
        """Append an event; it is with the operating system before the next one happens.

        The updates of running tools are left out: the results repeat them, and a command may write for ever.
        """
        if isinstance(event, ToolUpdate):
            return
        self._file.write(to_json(event) + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
