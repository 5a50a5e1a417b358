"""What a person sees of a session on a terminal: a line for each event, and running output as it comes."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from taskfactory.events import MAX_LINE, AnyEvent, ToolResult, ToolUpdate, render_line


class TextDisplay:
    """Shows events through `write`, which gets whole lines without a control byte in them."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._begun: dict[str, str] = {}  # what a running call has written of its last line

    def show(self, event: AnyEvent) -> None:
        """Show an event. Of a running tool's output every line is shown when it has ended, or its tool has."""
        if isinstance(event, ToolUpdate):
            self._update(event)
            return
        if isinstance(event, ToolResult):
            rest = self._begun.pop(event.call_id, "")
            if rest:
                self._write(render_line(ToolUpdate(call_id=event.call_id, text=rest)))
        self._write(render_line(event))

    def _update(self, event: ToolUpdate) -> None:
        first, *more = event.text.split("\n")
        lines = [self._begun.pop(event.call_id, "") + first, *more]
        rest = lines.pop()
        for line in lines:
            self._write(render_line(msgspec.structs.replace(event, text=line)))
        if rest:
            self._begun[event.call_id] = rest[: MAX_LINE + 1]  # more is not shown of any line
