"""The command line: `taskfactory run` runs one task with a scripted agent.

Exit codes: 0 the task was done, 1 it failed or was refused, 2 wrong usage or a wrong file, 130 ended
by Ctrl-C, SIGTERM or SIGHUP, 141 ended because nobody reads the output any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from taskfactory.agents.scripted import ScriptedModel
from taskfactory.attachments import read_attachments
from taskfactory.display import TextDisplay
from taskfactory.document import read_document
from taskfactory.errors import ConfigError, ExtensionError, UnsafePathError
from taskfactory.events import (
    AnyEvent,
    Status,
    escape,
    escape_block,
    json_line,
    to_json,
)
from taskfactory.extensions import Hooks, load_extension
from taskfactory.runner import Summary, run_task
from taskfactory.sandboxconfig import merge_sandbox
from taskfactory.sandboxing import open_place
from taskfactory.sessionlog import SessionLog
from taskfactory.settings import read_settings
from taskfactory.taskfile import load
from taskfactory.workspace import open_workspace, refuse_inside

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_SCRIPT_SUFFIX = ".script.yaml"
_INTERRUPTED = 128 + signal.SIGINT
_NO_READER = 128 + signal.SIGPIPE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="taskvm")  # the distribution that holds both packages
def main() -> None:
    """Run coding agents' tasks in a sandbox."""


@main.command()
@click.argument("task_file", type=_FILE)
@click.option(
    "--workspace", type=_DIRECTORY, required=True, help="The directory the agent works in."
)
@click.option(
    "--agent",
    type=_FILE,
    help="The script the agent follows (YAML or JSON). Default: TASK.script.yaml beside TASK_FILE.",
)
@click.option("--sandbox-config", type=_FILE, help="A sandbox.json instead of the registered one.")
@click.option(
    "--extension",
    "extensions",
    type=_FILE,
    multiple=True,
    help="A Python file with register(hooks).",
)
@click.option("--json", "as_json", is_flag=True, help="Print events and the summary as JSON lines.")
def run(
    task_file: Path,
    workspace: Path,
    agent: Path | None,
    sandbox_config: Path | None,
    extensions: tuple[Path, ...],
    *,
    as_json: bool,
) -> None:
    """Run the task in TASK_FILE."""
    request = _Request(task_file, workspace, agent, sandbox_config, extensions, as_json)
    try:
        code = _run(request)
    except (ConfigError, UnsafePathError, ExtensionError) as error:
        click.echo(escape_block(str(error)), err=True)
        sys.exit(2)
    except (KeyboardInterrupt, asyncio.CancelledError):
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            click.echo("Ended on request; whatever the task had started is gone.", err=True)
        sys.exit(_INTERRUPTED)
    except _WritingFailed as failure:
        sys.exit(_say_why(failure))
    sys.exit(code)


@dataclass(frozen=True, slots=True)
class _Request:
    """The arguments of `run`."""

    task_file: Path
    workspace: Path
    agent: Path | None
    sandbox_config: Path | None
    extensions: tuple[Path, ...]
    as_json: bool


def _run(request: _Request) -> int:
    settings = read_settings(os.environ, Path.home())
    workspace = open_workspace(request.workspace, settings.home, request.sandbox_config)
    file = load(request.task_file)
    config = merge_sandbox(
        workspace=workspace.sandbox_source(),
        task=file.sandbox_source(),
        env_default=settings.sandbox_default,
    )
    attachments = read_attachments(file)
    model, hooks = _agent(request), _hooks(request)
    with _open_log(settings.home, file.task.id) as log:
        show = _show_json if request.as_json else TextDisplay(click.echo).show

        def emit(event: AnyEvent) -> None:
            _written(f"the record {log.directory}", lambda: log.write(event))
            _written("the output", lambda: show(event))

        opening = open_place(
            config,
            workspace.path,
            audit_path=log.audit_path,
            say=lambda text: emit(Status(text=text)),
        )
        work = run_task(file.task, opening, model, hooks, emit, attachments=attachments)
        summary = asyncio.run(_until_signal(work))
        _written("the output", lambda: _show_summary(summary, log, as_json=request.as_json))
    return 0 if summary.ok else 1


def _agent(request: _Request) -> ScriptedModel:
    script = request.agent or request.task_file.with_suffix(_SCRIPT_SUFFIX)
    refuse_inside(request.workspace, script, "agent's script")
    if request.agent is None and not script.is_file():
        raise click.UsageError(
            f"run the task {request.task_file}: it has no agent. Write the agent's script to {script},"
            " or name one with --agent"
        )
    return ScriptedModel.from_document(read_document(script))


def _hooks(request: _Request) -> Hooks:
    hooks = Hooks()
    for path in request.extensions:
        load_extension(path, hooks, request.workspace)
    return hooks


async def _until_signal(work: Coroutine[Any, Any, Summary]) -> Summary:
    """Do the work; SIGTERM and SIGHUP cancel it as Ctrl-C does, so that the sandbox is released and changes kept."""
    task = asyncio.current_task()
    assert task is not None, "this is a coroutine of asyncio.run"

    def stop() -> None:
        # Once: a terminal that closes sends SIGHUP, and its shell sends another one into the tidying up.
        if not task.cancelling():
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup`
            asyncio.get_running_loop().add_signal_handler(number, stop)
    return await work


# Writing...


class _WritingFailed(Exception):  # noqa: N818 - it reads as what happened
    """The record or the output cannot be written: the run ends, and the sandbox is released."""

    def __init__(self, what: str, error: OSError) -> None:
        super().__init__(f"write {what}: {error.strerror or error}")
        self.error = error


def _open_log(home: Path, task_id: str) -> SessionLog:
    try:
        return SessionLog(home, task_id)
    except OSError as error:
        raise _WritingFailed(
            f"the session's record below {home} (TASKFACTORY_HOME)", error
        ) from error


def _written(what: str, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise _WritingFailed(what, error) from error


def _say_why(failure: _WritingFailed) -> int:
    """Tell the reason, unless it is a reader that has left, and return the exit code."""
    # What is still in the buffer would fail once more when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(failure.error, BrokenPipeError):
        return _NO_READER
    with contextlib.suppress(OSError):
        click.echo(escape(f"{failure}. Free space or permissions"), err=True)
    return 1


# Showing...


def _show_json(event: AnyEvent) -> None:
    click.echo(to_json(event))


def _show_summary(summary: Summary, log: SessionLog, *, as_json: bool) -> None:
    if as_json:
        click.echo(json_line(summary))
        return
    if summary.error:
        click.echo(escape_block(summary.error), err=True)
    click.echo(f"task     {escape(summary.task_id)}: {summary.outcome}")
    click.echo(f"place    {escape(summary.place)}")
    click.echo(f"tools    {summary.tool_calls} calls, {summary.tool_errors} errors")
    for refusal in summary.refusals:
        click.echo(f"refused  {escape(refusal.target)}: {escape(refusal.reason)}")
    click.echo(f"time     {summary.duration_s:.1f} s")
    click.echo(f"record   {log.directory}")
