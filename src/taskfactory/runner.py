"""One run of one task: take the place, tell the extensions, let the agent work, give the place back.

The run owns the place (the sandbox), not any event: it is acquired before the agent's first prompt
and released on every path. `session_shutdown` fires after that, also on every path.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import msgspec

from taskfactory.agents.loop import AgentSession, Emit, Model
from taskfactory.agents.place import Place, Refusal
from taskfactory.attachments import AttachedFile
from taskfactory.errors import EnvironmentUnavailable, TaskfactoryError, TaskFailed
from taskfactory.events import AnyEvent, SessionShutdown, SessionStart, Status, ToolResult
from taskfactory.extensions import Hooks
from taskfactory.task import Task, render_prompt

OpenPlace = AbstractAsyncContextManager[Place]
ATTACHED = "/tmp/attachments"  # of the guest; every account of its may write there
OnSession = Callable[[AgentSession], None]


class Summary(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="summary"):
    """How a run went. `outcome` is success, failure (the task), refused (no place) or error."""

    task_id: str
    outcome: str
    error: str = ""
    sandboxed: bool | None = None
    place: str = ""
    tool_calls: int = 0
    tool_errors: int = 0
    refusals: Sequence[Refusal] = ()
    duration_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the task was done."""
        return self.outcome == "success"


def _unattended(session: AgentSession) -> None:
    """No person takes part."""


async def run_task(
    task: Task,
    opening: OpenPlace,
    model: Model,
    hooks: Hooks,
    emit: Emit,
    *,
    attachments: Sequence[AttachedFile] = (),
    on_session: OnSession = _unattended,
) -> Summary:
    """Run a task to its end and say how it went. Only cancellation, and bugs, raise.

    `on_session` gets the session before the agent's first prompt: a person's commands go to its `user_bash`.
    """
    run = _Run(task, emit)
    try:
        async with run.announced(hooks), opening as place:
            run.place = place
            start = SessionStart(
                task_id=task.id,
                sandboxed=place.sandboxed,
                cwd=place.paths.root,
                place=place.description,
            )
            run.emit(start)
            await hooks.session_start(start)
            attached = [await _bring(file, place) for file in attachments]
            session = AgentSession(place, hooks, run.emit)
            on_session(session)
            await session.run(model, render_prompt(task, attached))
    except TaskfactoryError as error:
        return run.summary(_outcome(error), str(error))
    return run.summary("success")


async def _bring(file: AttachedFile, place: Place) -> str:
    """Give the place an attachment, and return the line that tells the agent of it.

    The guest gets a copy: what it does to it stays there.
    """
    path = str(file.path)
    if place.sandboxed:
        path = f"{ATTACHED}/{file.path.name}"
        await place.operations.write_bytes(path, file.data)
    kind = f"{file.attachment.mime_type}, {len(file.data)} bytes"
    return f"{file.attachment.filename} ({kind}): {path}"


class _Run:
    """What is known of a run while it lasts."""

    def __init__(self, task: Task, emit: Emit) -> None:
        self.place: Place | None = None
        self._task = task
        self._emit = emit
        self._started = time.monotonic()
        self._calls = 0
        self._errors = 0

    def emit(self, event: AnyEvent) -> None:
        if isinstance(event, ToolResult):
            self._calls += 1
            self._errors += event.is_error
        self._emit(event)

    @asynccontextmanager
    async def announced(self, hooks: Hooks) -> AsyncIterator[None]:
        """Fire session_shutdown when the block is left, however that happens."""
        outcome = "error"
        try:
            yield
            outcome = "success"
        except TaskfactoryError as error:
            outcome = _outcome(error)
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            event = SessionShutdown(outcome=outcome)
            try:
                self.emit(event)
            finally:  # the output may be gone, and the record's disk full
                for failure in await hooks.session_shutdown(event):
                    self.emit(Status(text=str(failure)))

    def summary(self, outcome: str, error: str = "") -> Summary:
        return Summary(
            task_id=self._task.id,
            outcome=outcome,
            error=error,
            sandboxed=self.place.sandboxed if self.place else None,
            place=self.place.description if self.place else "nowhere: nothing was run",
            tool_calls=self._calls,
            tool_errors=self._errors,
            refusals=self.place.refusals() if self.place else (),
            duration_s=round(time.monotonic() - self._started, 3),
        )


def _outcome(error: TaskfactoryError) -> str:
    if isinstance(error, TaskFailed):
        return "failure"
    return "refused" if isinstance(error, EnvironmentUnavailable) else "error"
