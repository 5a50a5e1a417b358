"""How help is laid out: commands and options in sections by what they are for, and examples at the end.

A list of thirty options in the order of the source is read by nobody. What stands in no section here is shown in the
last one, so that a new option is never hidden; `tests/unit/test_cli_help.py` holds that each has a section.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import click

from taskvm.cli.commandlimits import NAMES as LIMITS

Row = TypeVar("Row")

# Commands of `taskvm` itself.
COMMANDS: Mapping[str, Sequence[str]] = {
    "One command, one sandbox": ("run", "shell"),
    "Sandboxes that stay": (
        "start",
        "ps",
        "exec",
        "attach",
        "logs",
        "cp",
        "publish",
        "kill",
        "stop",
        "supervisor",
    ),
    "What may leave, and what did": ("policy", "secret", "log"),
    "What sandboxes start from": ("image", "checkpoint"),
    "This host": ("doctor", "completion"),
}

# Options of the commands that make a sandbox, by their parameters' names.
OPTIONS: Mapping[str, Sequence[str]] = {
    "Command": ("tty", "interactive", "env", "cwd", "user", "timeout"),
    "What the command may use": LIMITS,
    "Folders": ("mounts", "hide", "private", "mount_limit", "apply", "diff_file"),
    "Network (nothing leaves unless it is allowed)": (
        "allow",
        "policy_file",
        "ask",
        "allow_addresses",
        "resolve",
        "ca_files",
        "passthrough",
        "publish",
        "audit",
    ),
    "Secrets (the guest sees placeholders)": ("secrets", "secret_files", "secret_commands"),
    "Machine": (
        "image",
        "checkpoint",
        "cpus",
        "memory",
        "disk_size",
        "disk_limit",
        "free_disk",
        "cpu_share",
        "accel",
        "cold",
    ),
    "Lifetime": ("max_duration", "idle_timeout", "idle_pause", "detach", "name", "detach_keys"),
}
_REST = "General"


class SandboxCommand(click.Command):
    """A command with the options of a sandbox, its help in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {
            parameter.name or "": record
            for parameter in self.get_params(ctx)
            if isinstance(parameter, click.Option)
            if (record := parameter.get_help_record(ctx)) is not None
        }
        for title, rows in in_sections(records, OPTIONS):
            with formatter.section(title):
                formatter.write_dl(rows)


def hide(command: click.Command, names: Collection[str]) -> None:
    """Name these options nowhere. `command` still reads them, to say more about one than that there is none."""
    for each in command.params:
        if isinstance(each, click.Option) and each.name in names:
            each.hidden = True


def in_sections(
    rows: Mapping[str, Row], sections: Mapping[str, Iterable[str]]
) -> list[tuple[str, list[Row]]]:
    """Return the rows under the titles that name them, empty titles left out; what none names is in the last."""
    named = {name for names in sections.values() for name in names}
    rest = {_REST: [name for name in rows if name not in named]}
    found = [
        (title, [rows[name] for name in names if name in rows])
        for title, names in {**sections, **rest}.items()
    ]
    return [(title, each) for title, each in found if each]


def examples(*lines: str) -> str:
    """Return an epilog that click leaves as it is."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
