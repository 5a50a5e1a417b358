"""taskvm.cli.help, taskvm.cli.complete, taskvm.cli.completion, taskvm.cli.table: help, completion and tables."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from taskvm.cli.commands import main
from taskvm.cli.group import Commands
from taskvm.cli.help import COMMANDS, OPTIONS, SandboxCommand, in_sections
from taskvm.cli.table import size, span, table

# Options of every command, which stand last.
GENERAL = {"quiet", "help"}


def _sandbox_commands() -> list[click.Command]:
    return [each for each in main.commands.values() if isinstance(each, SandboxCommand)]


def test_every_command_has_a_section() -> None:
    named = [name for names in COMMANDS.values() for name in names]

    assert isinstance(main, Commands)
    assert sorted(named) == sorted(main.commands)


@pytest.mark.parametrize(
    "arguments", [[], *([name] for name, each in main.commands.items() if isinstance(each, click.Group))]
)  # fmt: skip
def test_no_line_of_a_list_of_commands_is_cut_off(arguments: list[str]) -> None:
    """In a terminal of 80 columns."""
    said = CliRunner().invoke(main, [*arguments, "--help"], terminal_width=80).output

    assert [line for line in said.splitlines()[1:] if line.endswith("...")] == []


def test_every_option_of_a_sandbox_has_a_section() -> None:
    """And no section names what is not there."""
    commands = _sandbox_commands()
    found = {
        each.name
        for command in commands
        for each in command.params
        if isinstance(each, click.Option)
    }
    named = [name for names in OPTIONS.values() for name in names]

    assert {command.name for command in commands} == {"run", "shell", "start"}
    assert sorted(named) == sorted(found - GENERAL)


@pytest.mark.parametrize("command", _sandbox_commands(), ids=lambda each: str(each.name))
def test_the_help_shows_every_option_and_examples(command: click.Command) -> None:
    shown = CliRunner().invoke(main, [str(command.name), "--help"]).output

    options = [
        each for each in command.params if isinstance(each, click.Option) and not each.hidden
    ]
    assert [name for each in options for name in each.opts if name not in shown] == []
    assert f"  taskvm {command.name} " in shown.partition("Examples:")[2]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--cwd", "/tmp"),
        ("--user", "nobody"),
        ("--timeout", "5"),
        ("--limit-memory", "64"),
        ("--limit-processes", "9"),
        ("--limit-cpus", "0.5"),
        ("--limit-disk-read", "1"),
        ("--limit-disk-write", "1"),
        ("--cpu-weight", "7"),
    ],
)
def test_the_help_of_start_shows_no_option_that_it_refuses(option: str, value: str) -> None:
    """It says where that belongs, and not that there is none."""
    shown = CliRunner().invoke(main, ["start", "--help"]).output
    refused = CliRunner().invoke(main, ["start", option, value])

    assert option not in shown
    assert refused.exit_code == 2
    assert "Say it to taskvm exec" in refused.output


def test_what_no_section_names_is_not_lost() -> None:
    assert in_sections({"a": 1, "new": 2}, {"First": ["a", "gone"], "Empty": ["no"]}) == [
        ("First", [1]),
        ("General", [2]),
    ]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_a_shell_gets_a_script(shell: str) -> None:
    """Bash's needs a bash of 4.4 to be made."""
    script = CliRunner().invoke(main, ["completion", shell]).output

    assert f"_TASKVM_COMPLETE={shell}_complete" in script


def _offered(line: str) -> list[str]:
    words = line.split(" ")
    environment = {
        "_TASKVM_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = CliRunner().invoke(main, prog_name="taskvm", env=environment)
    return [answer.partition(",")[2] for answer in done.output.split()]


def test_names_of_what_is_there_are_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of the store; names that the store gave itself mean nothing to a person."""
    monkeypatch.setenv("TASKVM_CACHE", str(tmp_path))
    (tmp_path / "refs").mkdir(mode=0o700)
    for name in ("default", "py", "spec-0123456789abcdef"):
        (tmp_path / "refs" / name).write_text("0" * 64)

    assert _offered("taskvm run --image p") == ["py"]
    assert _offered("taskvm image show ") == ["default", "py"]


def test_where_nothing_runs_nothing_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No message either: it would stand in the line that is typed."""
    monkeypatch.setenv("TASKVM_RUNTIME", str(tmp_path / "runtime"))

    assert _offered("taskvm exec ") == []
    assert _offered("taskvm checkpoint show ") == []


def test_a_table_is_as_wide_as_its_cells() -> None:
    assert table(("A", "LONG"), [("aaa", "b"), ("", "c")]) == "A    LONG\naaa  b\n     c"
    assert table(("A",), []) == "A"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (7199, "119 min"), (7200, "2 h"), (2e5, "2 d")],
)
def test_a_span_of_time_has_one_unit(seconds: float, text: str) -> None:
    assert span(seconds) == text
    assert size(3 * 1024**2) == "3 MiB"
