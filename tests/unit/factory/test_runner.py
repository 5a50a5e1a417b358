"""taskfactory.runner, extensions and sessionlog: one run, whatever happens in it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from tests.support.waiting import until

from taskfactory.agents.loop import Model
from taskfactory.agents.place import Place, Refusal, host_place
from taskfactory.agents.scripted import ScriptedModel
from taskfactory.attachments import AttachedFile
from taskfactory.document import parse_document
from taskfactory.errors import EnvironmentUnavailable, ExtensionError, UnsafePathError
from taskfactory.events import (
    AnyEvent,
    BeforeAgentStart,
    SessionShutdown,
    SessionStart,
    Status,
    ToolUpdate,
)
from taskfactory.extensions import Hooks, load_extension
from taskfactory.runner import Summary, run_task
from taskfactory.sessionlog import SessionLog
from taskfactory.task import Attachment, Task

TASK = Task(id="A-1", title="Try")
WORKS = (
    "- tools: [{tool: bash, arguments: {command: echo hi}}, {tool: read, arguments: {path: no}}]"
)
FAILS = "- tools: [{tool: bash, arguments: {command: 'false'}, expect: {contains: [x]}}]"
HANGS = "- tools: [{tool: bash, arguments: {command: sleep 600}}]"


class Run:
    """A run on the host, with the order in which things happened."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hooks = Hooks()
        self.happened: list[str] = []
        self.events: list[AnyEvent] = []
        self.hooks.on_session_start(self._start)
        self.hooks.on_session_shutdown(self._shutdown)

    async def go(self, text: str) -> Summary:
        model = ScriptedModel.from_document(parse_document(text, "s"))
        return await self.go_with(model, self.place())

    async def go_with(self, model: Model, opening: AbstractAsyncContextManager[Place]) -> Summary:
        return await run_task(TASK, opening, model, self.hooks, self.events.append)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        self.happened.append("acquired")
        try:
            yield host_place(self.root)
        finally:
            self.happened.append("released")

    async def _start(self, event: SessionStart) -> None:
        self.happened.append("start")

    async def _shutdown(self, event: SessionShutdown) -> None:
        self.happened.append(event.outcome)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


async def test_a_run_that_works(run: Run) -> None:
    summary = await run.go(WORKS)

    assert run.happened == ["acquired", "start", "released", "success"]
    assert summary.ok
    assert (summary.tool_calls, summary.tool_errors, summary.sandboxed) == (2, 1, False)
    assert summary.duration_s > 0


async def test_on_the_host_an_attachment_stays_where_it_is(run: Run, tmp_path: Path) -> None:
    attachment = Attachment(id="1", filename="a b.txt", stored_name="1.txt", mime_type="text/plain")
    file = AttachedFile(attachment, tmp_path / "1.txt", b"x")

    await run_task(
        TASK,
        run.place(),
        ScriptedModel([]),
        run.hooks,
        run.events.append,
        attachments=[file],
    )

    [prompt] = [event.prompt for event in run.events if isinstance(event, BeforeAgentStart)]
    assert prompt.endswith(f"## Attachments\n- a b.txt (text/plain, 1 bytes): {tmp_path}/1.txt\n")


async def test_a_task_that_fails(run: Run) -> None:
    summary = await run.go(FAILS)

    assert run.happened == ["acquired", "start", "released", "failure"]
    assert (summary.ok, summary.outcome) == (False, "failure")
    assert "turn 1: bash" in summary.error


async def test_a_run_that_is_cancelled(run: Run) -> None:
    running = asyncio.get_running_loop().create_task(run.go(HANGS))
    await until(lambda: "start" in run.happened)
    running.cancel()
    await asyncio.wait([running])

    assert running.cancelled()

    assert run.happened == ["acquired", "start", "released", "cancelled"]


async def test_a_run_with_a_mistake_of_ours(run: Run) -> None:
    class Broken:
        async def next(self, conversation: object) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run.go_with(Broken(), run.place())

    assert run.happened == ["acquired", "start", "released", "error"]


async def test_a_run_without_a_place_runs_nothing(run: Run) -> None:
    @asynccontextmanager
    async def unavailable() -> AsyncIterator[Place]:
        raise EnvironmentUnavailable("no QEMU")
        yield host_place(run.root)

    model = ScriptedModel.from_document(parse_document(WORKS, "s"))
    summary = await run.go_with(model, unavailable())

    assert run.happened == ["refused"]
    assert (summary.outcome, summary.error, summary.sandboxed) == ("refused", "no QEMU", None)
    assert summary.tool_calls == 0


async def test_an_extension_that_fails_at_the_start_ends_the_run(run: Run) -> None:
    async def broken(event: SessionStart) -> None:
        raise RuntimeError("oops")

    run.hooks.on_session_start(broken)
    summary = await run.go(WORKS)

    assert run.happened == ["acquired", "start", "released", "error"]
    assert "oops" in summary.error
    assert summary.tool_calls == 0


async def test_every_shutdown_handler_runs_though_one_fails(run: Run) -> None:
    async def broken(event: SessionShutdown) -> None:
        raise RuntimeError("oops")

    async def last(event: SessionShutdown) -> None:
        run.happened.append("last")

    run.hooks.on_session_shutdown(broken)
    run.hooks.on_session_shutdown(last)
    summary = await run.go(WORKS)

    assert run.happened[-2:] == ["success", "last"]
    assert summary.ok
    assert any(isinstance(event, Status) and "oops" in event.text for event in run.events)


@pytest.mark.parametrize("at", [SessionStart, SessionShutdown])
async def test_every_shutdown_handler_runs_though_nothing_can_be_written(
    run: Run, at: type[AnyEvent]
) -> None:
    """`| head -1`, or a full disk: from some event on, each one fails."""
    broken = False

    def emit(event: AnyEvent) -> None:
        nonlocal broken
        broken = broken or isinstance(event, at)
        if broken:
            raise OSError("no reader")

    model = ScriptedModel.from_document(parse_document(WORKS, "s"))
    with pytest.raises(OSError, match="no reader"):
        await run_task(TASK, run.place(), model, run.hooks, emit)

    assert run.happened[0] == "acquired"
    assert run.happened[-2] == "released"
    assert run.happened[-1] in ("error", "success")


async def test_the_summary_has_what_was_refused_by_then(run: Run) -> None:
    refusals: list[Refusal] = []

    @asynccontextmanager
    async def place() -> AsyncIterator[Place]:
        here = host_place(run.root)
        yield Place(here.operations, here.paths, True, "x", lambda: tuple(refusals))
        refusals.append(Refusal("evil.test:443", "no rule allows this host"))

    model = ScriptedModel.from_document(parse_document(WORKS, "s"))
    summary = await run.go_with(model, place())

    assert summary.refusals == (Refusal("evil.test:443", "no rule allows this host"),)


# Extensions from files...


def test_an_extension_file_registers_itself(tmp_path: Path) -> None:
    path = tmp_path / "ext.py"
    path.write_text("def register(hooks):\n    hooks.replace_operations(lambda o: 'mine')\n")
    hooks = Hooks()

    load_extension(path, hooks, tmp_path / "workspace")

    assert hooks.operations(None) == "mine"  # type: ignore[arg-type, comparison-overlap] # it is opaque here


@pytest.mark.parametrize(
    "text",
    ["raise ValueError('x')", "raise SystemExit(0)", "", "def register(hooks): 1/0", "def ("],
)
def test_an_extension_that_does_not_load_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ext.py"
    path.write_text(text)

    with pytest.raises(ExtensionError, match=r"load the extension .*ext\.py"):
        load_extension(path, Hooks(), tmp_path / "workspace")


def test_an_extension_in_the_workspace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ext.py"
    path.write_text("raise SystemExit")

    with pytest.raises(UnsafePathError):
        load_extension(path, Hooks(), tmp_path)


async def test_an_extension_that_cannot_replace_the_operations_ends_the_run(run: Run) -> None:
    run.hooks.replace_operations(lambda operations: 1 / 0)  # type: ignore[arg-type, return-value] # it fails
    summary = await run.go(WORKS)

    assert "ZeroDivisionError" in summary.error
    assert summary.tool_calls == 0


# The record...


@pytest.mark.parametrize("task_id", ["A-1", "../../etc", "..", "", "a/b\n\x1b[0m"])
def test_a_record_lies_in_the_users_home_whatever_the_tasks_id(
    tmp_path: Path, task_id: str
) -> None:
    with SessionLog(tmp_path, task_id) as log:
        log.write(Status(text="x"))
        log.write(ToolUpdate(call_id="1", text="the result repeats it"))

    assert log.directory.resolve().parent == tmp_path / "sessions"
    assert log.directory.stat().st_mode & 0o077 == 0
    assert json.loads(log.events_path.read_text()) == {"event": "status", "text": "x"}
