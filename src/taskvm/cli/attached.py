"""`taskvm shell`, `exec` and `attach`: this terminal, or these streams, at a command of a sandbox in the supervisor.

Leaving is not ending: the detach keys, a terminal that hangs up and a client that is killed leave the command running.
Ctrl-C and SIGTERM end what `shell` and `exec` have started; `attach` only leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine

import click

import taskvm
from taskvm import HostError, TaskvmError, UsageError
from taskvm.cli import complete
from taskvm.cli.commandlimits import limit_options
from taskvm.cli.detach import DEFAULT_KEYS, DetachKeys
from taskvm.cli.group import EXIT_NO_READER, EXIT_TIMEOUT
from taskvm.cli.help import SandboxCommand, examples
from taskvm.cli.options import SandboxArguments, read_variables, sandbox_options
from taskvm.cli.streams import (
    STDIN,
    DetachedError,
    NoReaderError,
    occupy_standard_streams,
    relay,
    terminal_environment,
    until_signal,
)
from taskvm.terminal import DEFAULT_SIZE, Terminal

LOGIN_SHELL = ("/bin/bash", "--login")
# What a client that is asked to end waits for the end of what it started.
END_TIMEOUT_S = 10.0

detach_keys = click.option(
    "--detach-keys",
    default=DEFAULT_KEYS,
    show_default=True,
    metavar="KEYS",
    help="Keys that leave the command running; an empty text for none.",
)
# `docker run -it` is in many fingers.
interactive_option = click.option(
    "--interactive", "-i", is_flag=True, help="Nothing: standard input is always passed."
)
name_option = click.option("--name", metavar="NAME", help="A name for the sandbox.")


@click.command(
    short_help="Open a shell in a new sandbox.",
    cls=SandboxCommand,
    context_settings={"allow_interspersed_args": False},
    epilog=examples(
        "taskvm shell --mount .:/workspace                     ^D ends it, and the sandbox",
        "taskvm shell --name app                               ^P ^Q leaves it running",
        "taskvm attach app                                     and this comes back",
    ),
)
@sandbox_options
@name_option
@detach_keys
@click.argument("command", nargs=-1)
def shell(
    arguments: SandboxArguments, name: str | None, detach_keys: str, command: tuple[str, ...]
) -> None:
    """Open a login shell of a new sandbox, or COMMAND, in this terminal. The sandbox ends with it.

    All keys go to the guest, Ctrl-C too, but for the detach keys: they leave it running, and so does a terminal that
    hangs up; `taskvm attach` comes back. The exit status is the shell's.
    """
    if not os.isatty(STDIN):
        raise UsageError(
            "open a shell in a sandbox",
            "standard input is not a terminal",
            "Use taskvm run for a command that needs none",
        )
    occupy_standard_streams()
    keys, terminal = DetachKeys.parse(detach_keys), Terminal(STDIN)
    started: list[taskvm.SandboxStatus] = []

    async def work() -> int:
        launch = make_launch(arguments, command or LOGIN_SHELL, terminal.size)
        status = await start_held(arguments, launch, name)
        started.append(status)
        attached = await taskvm.Supervisor().attach(status.id)
        return await _converse(attached, terminal, keys, status.name or status.id)

    async def on_signal(number: int) -> None:
        if started and number != signal.SIGHUP:
            await _finish(taskvm.Supervisor().stop(started[0].id))

    sys.exit(_run(work(), on_signal))


@click.command(
    "exec",
    short_help="Run a command in a running sandbox.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("--tty", "-t", is_flag=True, help="Give the command a terminal.")
@interactive_option
@click.option("--user", "-u", metavar="USER", help="Account of the guest: a name, or UID:GID.")
@click.option("--env", "-e", "env", multiple=True, metavar="K=V", help="Set a variable.")
@click.option("--cwd", "-w", metavar="DIR", help="Working directory in the guest.")
@click.option("--timeout", type=float, metavar="S", help="Kill the command after S seconds.")
@click.option(
    "--detach", "-d", is_flag=True, help="Print the command's number and leave it running."
)
@limit_options
@detach_keys
@click.argument("sandbox", shell_complete=complete.sandboxes)
@click.argument("command", nargs=-1, required=True)
def exec_(
    limits: taskvm.ExecLimits | None,
    tty: bool,
    interactive: bool,
    user: str | None,
    env: tuple[str, ...],
    cwd: str | None,
    timeout: float | None,
    detach: bool,
    detach_keys: str,
    sandbox: str,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND in the running SANDBOX (name, id, or its beginning), and exit as it does."""
    if command[0] != "--" and command[0].startswith("-"):
        raise UsageError(
            f"run a command in {sandbox}",
            f"{command[0]} stands where the command begins",
            "Write options before the sandbox's name, or -- before such a command",
        )
    command = command[command[0] == "--" :]  # as after the options of `taskvm run`
    if not command:
        raise UsageError(f"run a command in {sandbox}", "there is none", "Write it after --")
    occupy_standard_streams()
    terminal = Terminal(STDIN) if tty and os.isatty(STDIN) else None
    keys = DetachKeys.parse(detach_keys) if terminal else None
    started: list[taskvm.Attachment] = []

    async def work() -> int:
        attached = await taskvm.Supervisor().exec(
            sandbox,
            command,
            cwd=cwd,
            env=read_variables(env) | (terminal_environment(env) if tty else {}),
            user=user,
            pty=(terminal.size if terminal else DEFAULT_SIZE) if tty else None,
            timeout_s=timeout,
            stdin=tty or not detach,
            limits=limits,
        )
        started.append(attached)
        if detach:
            click.echo(attached.number)
            await attached.detach()
            return 0
        again = f"{sandbox} {attached.number}"
        try:
            return await _converse(attached, terminal, keys, again, owns_input=True)
        except (NoReaderError, HostError):  # nobody can have its output, as in a pipe
            await _finish(_end(sandbox, attached.number))
            raise

    async def on_signal(number: int) -> None:
        if started and not (terminal and number == signal.SIGHUP):
            await _finish(_end(sandbox, started[0].number))

    sys.exit(_run(work(), on_signal))


@click.command(short_help="Come back to a command of a running sandbox.")
@detach_keys
@click.argument("sandbox", shell_complete=complete.sandboxes)
@click.argument("number", required=False, type=int, metavar="[EXEC]")
def attach(detach_keys: str, sandbox: str, number: int | None) -> None:
    """Attach this terminal to the main command of SANDBOX, or to that with the number EXEC of `taskvm ps`.

    Its last output is shown first. Several may be attached at once. The exit status is the command's.
    """
    occupy_standard_streams()
    terminal = Terminal(STDIN) if os.isatty(STDIN) else None

    async def work() -> int:
        size = terminal.size if terminal else None
        attached = await taskvm.Supervisor().attach(sandbox, number, size=size)
        ours = terminal if attached.pty else None
        keys = DetachKeys.parse(detach_keys) if ours else None
        again = sandbox if number is None else f"{sandbox} {number}"
        return await _converse(attached, ours, keys, again)

    sys.exit(_run(work(), None))


# What they share.


def make_launch(
    arguments: SandboxArguments,
    command: tuple[str, ...],
    pty: tuple[int, int] | None,
    *,
    stdin: bool = True,
) -> taskvm.Launch:
    """Return the main command of a sandbox in the supervisor."""
    return taskvm.Launch(
        command=list(command),
        cwd=arguments.cwd,
        env=terminal_environment(arguments.env) if pty else {},
        user=arguments.user,
        pty=pty,
        stdin=stdin,
        timeout_s=arguments.timeout,
        limits=arguments.limits,
    )


async def start_held(
    arguments: SandboxArguments, launch: taskvm.Launch | None, name: str | None
) -> taskvm.SandboxStatus:
    """Start a sandbox in the supervisor and tell where its ports are."""
    if arguments.reviewed:
        raise UsageError(
            f"mount {arguments.reviewed[0]} for review",
            "nobody would look at the changes of a sandbox that outlives its command line",
            "Use taskvm run, with --tty for a shell, or the SDK",
        )
    variables = arguments.variables()
    arguments.create(variables)  # what is wrong is said before a supervisor is started
    status = await taskvm.Supervisor().start(
        arguments.portable(),
        launch=launch,
        name=name,
        variables=variables,
        on_progress=arguments.on_progress,
    )
    for address, port in status.forwards.items():
        click.echo(f"taskvm: port {port} of the guest is at {address}", err=True)
    return status


async def _converse(
    attached: taskvm.Attachment,
    terminal: Terminal | None,
    keys: DetachKeys | None,
    again: str,
    *,
    owns_input: bool = False,
) -> int:
    """Give the standard streams to the command until it ends, or the user leaves it: `attach` `again` comes back."""
    async with attached:
        try:
            with terminal or contextlib.nullcontext():
                result = await relay(attached, terminal, keys=keys, owns_input=owns_input)
        except DetachedError:
            click.echo(f"\ntaskvm: left running; come back with: taskvm attach {again}", err=True)
            return 0
        except TaskvmError:
            if terminal:
                click.echo(err=True)  # the guest has left the cursor anywhere
            raise
    if attached.skipped:
        click.echo(f"taskvm: {attached.skipped} bytes of output were not shown in time", err=True)
    if result.timed_out:
        click.echo(f"taskvm: {attached.command}: killed at its timeout", err=True)
        return EXIT_TIMEOUT
    return result.exit_code


def _run(
    work: Coroutine[object, object, int], on_signal: Callable[[int], Awaitable[None]] | None
) -> int:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        return asyncio.run(until_signal(work, numbers=numbers, on_signal=on_signal))
    except NoReaderError:
        return EXIT_NO_READER


async def _end(sandbox: str, number: int) -> None:
    async with await taskvm.Supervisor().attach(sandbox, number) as attached:
        await attached.kill_all()


async def _finish(work: Coroutine[object, object, object]) -> None:
    with contextlib.suppress(TaskvmError, TimeoutError):  # it has ended by itself
        async with asyncio.timeout(END_TIMEOUT_S):
            await work
