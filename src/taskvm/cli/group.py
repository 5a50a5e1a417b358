"""`taskvm` itself: its help, its version, and how our errors end it."""

from __future__ import annotations

import errno

import click

import taskvm
from taskvm import GuestError, TaskvmError, UsageError
from taskvm.cli.help import COMMANDS, examples, in_sections

# Exit statuses, besides those of the guest's command: 124 as timeout(1); 125, 126, 127 as env(1).
EXIT_USAGE = 2
EXIT_TIMEOUT = 124
EXIT_FAILURE = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # 128 + SIGPIPE, as every program in a pipe whose reader has gone


class Commands(click.Group):
    """Turns our errors into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TaskvmError as error:
            click.echo(f"taskvm: {error}{_advice(error)}", err=True)
            ctx.exit(_exit_status(error))
        except BrokenPipeError:
            raise  # click's
        except OSError as error:  # the working directory is gone, a file cannot be written
            cause = str(error.strerror or error) or type(error).__name__
            told = f"{error.filename}: {cause}" if error.filename else cause
            click.echo(f"taskvm: {taskvm.printable(told)}", err=True)
            ctx.exit(EXIT_FAILURE)
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = {
            name: (name, command.get_short_help_str(formatter.width - 20))
            for name, command in self.commands.items()
        }
        for title, each in in_sections(rows, COMMANDS):
            with formatter.section(title):
                formatter.write_dl(each)


def _exit_status(error: TaskvmError) -> int:
    if isinstance(error, UsageError):
        return EXIT_USAGE
    if isinstance(error, GuestError) and error.call == "execve":
        return EXIT_NOT_FOUND if error.errno == errno.ENOENT else EXIT_NOT_EXECUTABLE
    return EXIT_FAILURE


def _advice(error: TaskvmError) -> str:
    """Return what only a person at a terminal needs to be told."""
    if _exit_status(error) != EXIT_NOT_FOUND:
        return ""
    return (
        ". The image does not have it (or its interpreter): `taskvm image build --include PACKAGE --name NAME`"
        " makes one that does, for --image NAME"
    )


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "taskvm doctor                                        can this host run one?",
        "taskvm run -- uname -a                               a command in a fresh machine",
        "taskvm run --mount .:/workspace -- make test         with this folder, without a network",
        "taskvm shell --name app --mount .:/workspace         a shell that can be left and come back to",
    ),
)
@click.version_option(taskvm.__version__)
def main() -> None:
    """Run untrusted programs in a micro-VM: no network but what you allow, no secret inside, only the folders
    you mount.
    """


def progress(line: str) -> None:
    click.echo(f"taskvm: {line}", err=True)


def silent(line: str) -> None:
    """For --quiet."""
