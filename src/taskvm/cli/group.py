"""`taskvm` itself: its help, its version, and how our errors end it."""

from __future__ import annotations

import click

import taskvm
from taskvm import TaskvmError, UsageError

# Exit statuses, besides those of the guest's command: 124 as timeout(1), 125 as env(1) for our own failures.
EXIT_TIMEOUT = 124
EXIT_FAILURE = 125
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # 128 + SIGPIPE, as every program in a pipe whose reader has gone


class Commands(click.Group):
    """Turns our errors into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TaskvmError as error:
            click.echo(f"taskvm: {error}", err=True)
            ctx.exit(2 if isinstance(error, UsageError) else EXIT_FAILURE)
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(taskvm.__version__)
def main() -> None:
    """Run untrusted programs in a micro-VM: no network but what you allow, no secret inside, only the folders
    you mount.
    """


def progress(line: str) -> None:
    click.echo(f"taskvm: {line}", err=True)


def silent(line: str) -> None:
    """For --quiet."""
