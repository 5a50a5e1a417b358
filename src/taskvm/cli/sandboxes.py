"""`taskvm start`, `ps`, `stop`, `kill`, `logs` and `cp`: the sandboxes that the supervisor holds."""

from __future__ import annotations

import asyncio
import os
import signal as signals
import sys
from pathlib import Path

import click
import msgspec

import taskvm
from taskvm import TaskvmError, UsageError
from taskvm.cli import complete
from taskvm.cli.attached import name_option, start_held
from taskvm.cli.commandlimits import NAMES as LIMITS
from taskvm.cli.group import EXIT_FAILURE, EXIT_NO_READER
from taskvm.cli.help import SandboxCommand, examples, hide
from taskvm.cli.options import SandboxArguments, published, sandbox_options
from taskvm.cli.streams import STDERR, STDOUT, NoReaderError, copy_stream, until_signal
from taskvm.cli.table import size, span, table

_COLUMNS = (
    "ID",
    "NAME",
    "IMAGE",
    "STATE",
    "AGE",
    "CPU",
    "MEMORY",
    "DISK",
    "ENDS IN",
    "PORTS",
    "COMMANDS",
)


@click.command(
    short_help="Start a sandbox that runs until it is stopped.",
    cls=SandboxCommand,
    epilog=examples(
        "taskvm start --name app --mount .:/workspace --idle-timeout 3600",
        "taskvm exec app -- make; taskvm cp app:/workspace/dist .; taskvm stop app",
    ),
)
@sandbox_options
@name_option
def start(arguments: SandboxArguments, name: str | None) -> None:
    """Start a sandbox without a command, print its id, and leave it running: `taskvm exec` uses it."""
    _refuse_unused(arguments)

    async def work() -> int:
        click.echo((await start_held(arguments, None, name)).id)
        return 0

    sys.exit(asyncio.run(until_signal(work())))


hide(start, ("cwd", "user", "timeout", *LIMITS))  # as _refuse_unused refuses them


@click.command(short_help="List the sandboxes that outlive their command line.")
@click.option("--all", "-a", "ended", is_flag=True, help="Also those that have ended.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.option("--quiet", "-q", is_flag=True, help="Print ids only.")
def ps(ended: bool, as_json: bool, quiet: bool) -> None:
    """List the sandboxes of the supervisor, and what they use of this host."""
    found = asyncio.run(taskvm.Supervisor().list(ended=ended))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)))
    elif quiet:
        click.echo("".join(f"{each.id}\n" for each in found), nl=False)
    else:
        click.echo(table(_COLUMNS, [_row(each) for each in found]))


@click.command(short_help="End sandboxes.")
@click.option("--all", "-a", "everything", is_flag=True, help="All that run.")
@click.argument("sandboxes", nargs=-1, metavar="[SANDBOX]...", shell_complete=complete.sandboxes)
def stop(everything: bool, sandboxes: tuple[str, ...]) -> None:
    """End sandboxes and everything in them, and print their ids. Exits with 125 when one could not be ended."""
    if bool(sandboxes) is everything:
        raise UsageError("stop sandboxes", "name some of them, or say --all")
    sys.exit(asyncio.run(_stop(sandboxes)))


@click.command(
    short_help="End a command of a running sandbox, or signal it.",
    epilog=examples(
        "taskvm exec -d app -- make watch                      its number is printed: 7",
        "taskvm kill app 7                                     SIGTERM, as kill(1)",
        "taskvm kill --all app 7                               also what it left running when it ended",
    ),
)
@click.option(
    "--signal", "-s", "signal_name", metavar="SIGNAL", help="A name or a number [default: TERM]."
)
@click.option(
    "--all", "-a", "everything", is_flag=True, help="All that it started (KILL), daemons too."
)
@click.argument("sandbox", shell_complete=complete.sandboxes)
@click.argument("number", type=int, metavar="EXEC")
def kill(signal_name: str | None, everything: bool, sandbox: str, number: int) -> None:
    """Send a signal to the process group of the command EXEC (its number in `taskvm ps`) of SANDBOX.

    With --all everything that the command started is killed, also when the command itself has ended.
    """
    if everything and signal_name is not None:
        raise UsageError("use --signal with --all", "all are killed", "Leave one of them out")
    supervisor = taskvm.Supervisor()
    if everything:
        asyncio.run(supervisor.kill_all(sandbox, number))
    else:
        signal = _signal(signal_name or "TERM")
        asyncio.run(supervisor.kill(sandbox, number, signal=signal))


@click.command(short_help="Print what a command has written.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, until it ends.")
@click.argument("sandbox", shell_complete=complete.sandboxes)
@click.argument("number", required=False, type=int, metavar="[EXEC]")
def logs(follow: bool, sandbox: str, number: int | None) -> None:
    """Print the last output of the main command of SANDBOX, or of that with the number EXEC: 256 KiB of each stream."""

    async def work() -> int:
        attaching = taskvm.Supervisor().attach(sandbox, number, follow=follow)
        async with await attaching as attached, asyncio.TaskGroup() as group:
            group.create_task(copy_stream(attached.stdout, STDOUT))
            group.create_task(copy_stream(attached.stderr, STDERR))
        return 0

    try:
        status = asyncio.run(until_signal(work()))
    except* NoReaderError:
        status = EXIT_NO_READER
    sys.exit(status)


@click.command(short_help="Make a server in a running sandbox reachable.")
@click.argument("sandbox", shell_complete=complete.sandboxes)
@click.argument("ports", nargs=-1, required=True, metavar="[HOST_PORT:]GUEST_PORT...")
def publish(sandbox: str, ports: tuple[str, ...]) -> None:
    """Make TCP servers in SANDBOX reachable at 127.0.0.1 of this host until it ends, and print their addresses."""

    async def work() -> None:
        for host_port, port in map(published, ports):
            click.echo(await taskvm.Supervisor().publish(sandbox, port, host_port=host_port))

    asyncio.run(work())


@click.command(short_help="Copy files between host and a sandbox.")
@click.argument("source", metavar="[SANDBOX:]SOURCE")
@click.argument("target", metavar="[SANDBOX:]TARGET")
def cp(source: str, target: str) -> None:
    """Copy a file or a tree into a running sandbox (`taskvm cp src work:/tmp`), or out of it (`taskvm cp work:/out .`).

    Guest paths are absolute. Into a directory that is there, the copy goes under its own name, as with cp(1). Links in
    a tree are copied as links; of a guest's link that is the source comes what it leads to. What comes out appears
    whole or not at all, and replaces nothing.
    """
    here, there = _split(source), _split(target)
    if (here is None) is (there is None):
        raise UsageError(
            f"copy {source} to {target}", "one of them is SANDBOX:PATH, and the other a host path"
        )
    if here is not None:
        path = Path(target)
        asyncio.run(_copy_out(here, path / Path(here[1]).name if path.is_dir() else path))
    elif there is not None:
        _refuse_link(Path(source), target)
        asyncio.run(_copy_in(source, there))


def _refuse_unused(arguments: SandboxArguments) -> None:
    """What was asked for and held for nothing would be missed when it matters."""
    said = {
        "--cwd": arguments.cwd,
        "--user": arguments.user,
        "--timeout": arguments.timeout,
        "--limit-… and --cpu-weight": arguments.limits,
    }
    unused = [option for option, value in said.items() if value is not None]
    if unused:
        raise UsageError(
            f"start a sandbox with {', '.join(unused)}",
            "that is for one command, and there is none",
            "Say it to taskvm exec, or use taskvm run --detach",
        )


async def _stop(sandboxes: tuple[str, ...]) -> int:
    supervisor = taskvm.Supervisor()
    names = sandboxes or [each.id for each in await supervisor.list()]
    outcomes = await asyncio.gather(*map(supervisor.stop, names), return_exceptions=True)
    status = 0
    for outcome in outcomes:
        if isinstance(outcome, taskvm.SandboxStatus):
            click.echo(outcome.id)
        elif isinstance(outcome, TaskvmError):
            click.echo(f"taskvm: {outcome}", err=True)
            status = EXIT_FAILURE
        else:
            raise outcome
    return status


def _refuse_link(source: Path, target: str) -> None:
    """A guest may have made it, in a folder that it can write to, to be given another file of the host."""
    if source.is_symlink():
        raise UsageError(
            f"copy {source} to {target}",
            "it is a symbolic link, and no link of the host is followed into a guest",
            f"Name what it leads to, if the guest may have that: {os.path.realpath(source)}",
        )


async def _copy_in(source: str, target: tuple[str, str]) -> None:
    await taskvm.Supervisor().copy_in(target[0], source, target[1], into=True)


async def _copy_out(source: tuple[str, str], target: Path) -> None:
    await taskvm.Supervisor().copy_out(source[0], source[1], target)


def _signal(text: str) -> int:
    """Return the number of a signal, as kill(1) takes it: 9, KILL or SIGKILL."""
    name = f"SIG{text.upper().removeprefix('SIG')}"
    number = int(text) if text.isdecimal() else getattr(signals.Signals, name, 0)
    if not 1 <= number <= signals.SIGRTMAX:
        raise UsageError(f"send the signal {text}", "there is none of this name or number")
    return int(number)


def _split(text: str) -> tuple[str, str] | None:
    """Return sandbox and path; None for a path of the host, which `./` or `/` tells from a name with a colon."""
    sandbox, colon, path = text.partition(":")
    return (sandbox, path) if colon and sandbox and not sandbox.startswith((".", "/")) else None


# The table.


def _row(status: taskvm.SandboxStatus) -> tuple[str, ...]:
    left = [each for each in (status.idle_left_s, status.life_left_s) if each is not None]
    running = status.state != "ended"
    return (
        status.id,
        status.name or "",
        status.image or "default",
        status.state,
        span(status.age_s),
        f"{status.cpu_s:.1f} s",
        size(status.memory_bytes),
        size(status.disk_bytes),
        span(min(left)) if left and running else "",
        ", ".join(f"{address}->{port}" for address, port in status.forwards.items())
        if running
        else "",
        _commands(status) if running else status.outcome,
    )


def _commands(status: taskvm.SandboxStatus) -> str:
    running = [each for each in status.execs if each.exit_code is None]
    return "; ".join(
        f"{each.number}: {each.command[:40]}{' (attached)' if each.attached else ''}"
        for each in running
    )
