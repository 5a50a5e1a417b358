"""The reference page names everything that can be set, and its example does what it says."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import msgspec
import pytest

import taskfactory.cli
import taskvm.cli.commands
from taskfactory.agents.scripted import Expectation, ScriptedCall, ScriptedCommand, ScriptedTurn
from taskfactory.agents.tools import AnyTool, builtin_tools
from taskfactory.events import (
    AnyEvent,
    SessionShutdown,
    SessionStart,
    ToolCall,
    ToolResult,
    UserBash,
)
from taskfactory.extensions import Hooks, load_extension
from taskfactory.runner import Summary
from taskfactory.sandboxconfig import SWITCH_VARIABLE, SandboxConfig, SandboxSecret
from taskfactory.settings import HOME_VARIABLE
from taskvm.egress.audit import AuditEvent
from taskvm.egress.policyfile import PolicyDocument, RuleTable, parse_document
from taskvm.supervisor.place import RUNTIME_VARIABLE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGE = (DOCS / "configuration.md").read_text(encoding="utf-8")
EXTENSIONS = (DOCS / "extensions.md").read_text(encoding="utf-8")
# "## Heading" to its text.
SECTIONS: dict[str, str] = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))


def _section(start: str) -> str:
    (text,) = (text for heading, text in SECTIONS.items() if heading.startswith(start))
    return text


def _code(text: str) -> set[str]:
    """Return the last word of each dotted name in `code` spans: `secrets.NAME.hosts` names `hosts`."""
    return {span.rpartition(".")[2] for span in re.findall(r"`([^`\n]+)`", text)}


def _keys(*types: type[msgspec.Struct]) -> set[str]:
    return {field.encode_name for each in types for field in msgspec.structs.fields(each)}


def _commands(command: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield each command that does something, with its words after the program's name."""
    if not isinstance(command, click.Group):
        yield path, command
    else:
        for name, each in command.commands.items():
            yield from _commands(each, f"{path} {name}".strip())


COMMANDS = dict(_commands(taskvm.cli.commands.main))
# The long table of options is theirs; a row that is not for all of them says for which.
STARTING = {"run", "shell", "start"}


def _options(command: click.Command) -> set[str]:
    options = (each for each in command.params if isinstance(each, click.Option))
    return {name for each in options for name in each.opts} - {"--help", "--version", "-h"}


def _hidden(command: click.Command) -> set[str]:
    """Return what help does not show: the page may name it."""
    options = (each for each in command.params if isinstance(each, click.Option) and each.hidden)
    return {name for each in options for name in each.opts}


def _written(text: str) -> set[str]:
    """Return the options in `code` spans: `--publish [HOST_PORT:]GUEST_PORT` names `--publish`."""
    words = (word for span in re.findall(r"`([^`\n]+)`", text) for word in re.split(r"[\s/]", span))
    return {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}


def _lines_about(path: str) -> list[str]:
    """Return the rows of the page for one command."""
    group, _, name = path.rpartition(" ")
    rows = [line for line in _section("taskvm").splitlines() if line.startswith("| `")]
    if path in STARTING:
        found = [line for line in rows if line.startswith("| `-")]
        for_some = re.compile(r"^\| [^|]*\(((?:`[a-z -]+`(?:, )?)+)(?: only)?\)")
        return [
            line
            for line in found
            if not (some := for_some.search(line)) or f"`{path}" in some.group(1)
        ]
    start = re.compile(
        rf"^\| `taskvm {group} ?(?:[^|]*`)?{name}\b" if group else rf"^\| `taskvm {name}\b"
    )
    return [line for line in rows if start.search(line)]


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_is_named_with_its_command(path: str) -> None:
    lines = _lines_about(path)

    assert lines, f"no row of docs/configuration.md is about taskvm {path}"
    shown = _options(COMMANDS[path]) - _hidden(COMMANDS[path])
    assert shown <= set().union(*map(_written, lines))


@pytest.mark.parametrize("path", COMMANDS)
def test_a_row_of_a_command_names_no_option_that_it_does_not_have(path: str) -> None:
    lines = _lines_about(path)
    if path in STARTING:
        lines = [re.split(r"[|(]", line)[1] for line in lines]

    assert set().union(*map(_written, lines)) <= _options(COMMANDS[path])


def test_every_option_of_the_application_is_named() -> None:
    section = _written(_section("taskfactory run"))

    for _, command in _commands(taskfactory.cli.main):
        assert _options(command) <= section


def test_every_key_of_a_policy_file_is_named() -> None:
    page = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| `")]
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)

    assert _keys(RuleTable) <= {line.split("`")[1] for line in table}
    assert _keys(PolicyDocument) <= set(re.findall(r"^(?:\[\[)?(\w+)", example, re.MULTILINE))
    assert parse_document(example, "docs/policy.md").rules


def test_every_key_of_a_sandbox_is_named_twice() -> None:
    """Once for the workspace's file, once for what a task may say of it."""
    keys = _keys(SandboxConfig)

    assert keys | _keys(SandboxSecret) <= _code(_section("sandbox.json"))
    assert keys - {"secrets"} <= _code(_section("The task's `sandbox` block"))


def test_the_defaults_of_a_sandbox_are_those_of_the_page() -> None:
    """The page says: nothing leaves, nothing is added, a task is refused."""
    defaults = msgspec.to_builtins(SandboxConfig())

    assert {key for key, value in defaults.items() if value} == {"onUnavailable", "workspaceMode"}
    assert (defaults["onUnavailable"], defaults["workspaceMode"]) == ("refuse", "direct")


def test_every_key_of_a_script_is_named() -> None:
    section = _code(_section("The agent's script"))

    assert _keys(ScriptedTurn, ScriptedCall, ScriptedCommand, Expectation) <= section


@pytest.mark.parametrize("tool", builtin_tools(), ids=lambda tool: tool.name)
def test_every_argument_of_a_tool_is_named(tool: AnyTool) -> None:
    (row,) = (
        line
        for line in _section("The agent's script").splitlines()
        if line.startswith(f"| `{tool.name}` |")
    )

    assert _keys(tool.arguments) <= _code(row)


@pytest.mark.parametrize("event", [*get_args(AnyEvent), Summary], ids=lambda event: event.__name__)
def test_every_event_is_named_with_its_keys(event: type[msgspec.Struct]) -> None:
    tag = event.__struct_config__.tag
    rows = [line for line in _section("The record").splitlines() if line.startswith(f"| `{tag}` |")]

    assert len(rows) == 1
    assert _keys(event) <= _code(rows[0])


def test_every_field_of_the_audit_log_is_named() -> None:
    assert _keys(AuditEvent) <= _code(_section("The record"))


def test_every_variable_is_named() -> None:
    assert {HOME_VARIABLE, SWITCH_VARIABLE, RUNTIME_VARIABLE, "TASKVM_CACHE"} <= _code(
        _section("Environment")
    )


def test_everything_that_an_extension_can_register_is_named_with_its_fields() -> None:
    names = {name for name in vars(Hooks) if name.startswith(("on_", "replace_"))}
    rows = [line.split("|")[1] for line in EXTENSIONS.splitlines() if line.startswith("| `")]
    events = (SessionStart, ToolCall, ToolResult, UserBash, SessionShutdown)
    fields = {field.name for event in events for field in msgspec.structs.fields(event)}

    assert names <= {name for row in rows for name in _code(row)}
    assert fields <= _code(EXTENSIONS)


async def test_the_pages_extension_keeps_the_tests(tmp_path: Path) -> None:
    """As it stands there."""
    (text,) = re.findall(r"```python\n(.*?)```", EXTENSIONS, re.DOTALL)
    (tmp_path / "guard.py").write_text(text)
    hooks = Hooks()

    load_extension(tmp_path / "guard.py", hooks, tmp_path / "workspace")
    call = ToolCall(call_id="1", tool="write", arguments={"path": "tests/test_a.py"})

    block = await hooks.tool_call(call)
    assert block is not None
    assert "stay as they are" in block.reason
    assert await hooks.tool_call(msgspec.structs.replace(call, tool="read")) is None


@pytest.mark.vm
def test_the_first_lines_of_the_readme_do_what_they_say(tmp_path: Path) -> None:
    """They show a change and leave the file as it was."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = readme.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "page.txt").write_text("the colour is red\n")

    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert "-the colour is red\n+the color is red\n" in done.stdout
    assert (tmp_path / "page.txt").read_text() == "the colour is red\n"


@pytest.mark.vm
def test_the_task_from_nothing_is_done(tmp_path: Path) -> None:
    """The page's first example, as it stands there."""
    (script,) = re.findall(r"```sh\n(.*?)```", _section("A task from nothing"), re.DOTALL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TASKFACTORY_HOME": str(tmp_path / "home")}

    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert "task     APP-1: success" in done.stdout
    assert (
        tmp_path / "demo" / "app" / "half.py"
    ).read_text() == "def half(n):\n    return n // 2\n"
