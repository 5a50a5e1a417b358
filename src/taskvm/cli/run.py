"""`taskvm run` and `taskvm shell`: a new sandbox for one command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterable

import click

import taskvm
from taskvm import UsageError
from taskvm.cli.group import EXIT_NO_READER, EXIT_TIMEOUT
from taskvm.cli.options import SandboxArguments, published, sandbox_options
from taskvm.cli.streams import STDIN, NoReaderError, occupy_standard_streams, relay, until_signal
from taskvm.terminal import DEFAULT_SIZE, Terminal

LOGIN_SHELL = ("/bin/bash", "--login")
_COMMAND_SETTINGS = {"ignore_unknown_options": False, "allow_interspersed_args": False}


@click.command(
    short_help="Run a command in a new sandbox.",
    context_settings=_COMMAND_SETTINGS,
)
@sandbox_options
@click.option("--tty", "-t", is_flag=True, help="Give the command a terminal.")
@click.argument("command", nargs=-1, required=True)
def run(arguments: SandboxArguments, tty: bool, command: tuple[str, ...]) -> None:
    """Run COMMAND in a new sandbox, stream its output, and exit as it does.

    Values of secrets come from the environment or a file, never from the command line.
    """
    _execute(arguments, command, tty=tty)


@click.command(
    short_help="Open a shell in a new sandbox.",
    context_settings=_COMMAND_SETTINGS,
)
@sandbox_options
@click.argument("command", nargs=-1)
def shell(arguments: SandboxArguments, command: tuple[str, ...]) -> None:
    """Open a login shell of a new sandbox, or COMMAND, in this terminal. The sandbox ends with it.

    All keys go to the guest, Ctrl-C too. The exit status is the shell's.
    """
    if not os.isatty(STDIN):
        raise UsageError(
            "open a shell in a sandbox",
            "standard input is not a terminal",
            "Use taskvm run for a command that needs none",
        )
    _execute(arguments, command or LOGIN_SHELL, tty=True)


def _execute(arguments: SandboxArguments, command: tuple[str, ...], *, tty: bool) -> None:
    """Run `command` in a new sandbox and exit as it does."""
    occupy_standard_streams()
    starting = arguments.create()
    try:
        status = asyncio.run(until_signal(_run(starting, arguments, command, tty=tty)))
    except NoReaderError:
        status = EXIT_NO_READER
    sys.exit(status)


async def _run(
    starting: taskvm.Opening[taskvm.Sandbox],
    arguments: SandboxArguments,
    command: tuple[str, ...],
    *,
    tty: bool,
) -> int:
    ports = [published(text) for text in arguments.publish]
    async with starting as vm:
        for host_port, guest_port in ports:
            forward = await vm.forward(guest_port, host_port=host_port)
            click.echo(f"taskvm: port {guest_port} of the guest is at {forward}", err=True)
        terminal = Terminal(STDIN) if tty and os.isatty(STDIN) else None
        size = terminal.size if terminal else DEFAULT_SIZE
        async with await vm.spawn(
            list(command),
            cwd=arguments.cwd,
            env=_terminal_environment(arguments.env) if tty else None,
            pty=size if tty else None,
        ) as process:
            try:
                async with asyncio.timeout(arguments.timeout):
                    with terminal or contextlib.nullcontext():
                        return await relay(process, terminal)
            except TimeoutError:
                await process.kill_all()
                text = f"{process.command}: killed after {arguments.timeout:g} s"
                click.echo(f"taskvm: {text}", err=True)
                return EXIT_TIMEOUT


def _terminal_environment(env: Iterable[str]) -> dict[str, str]:
    """Tell the guest which terminal this is, unless the user said another."""
    said = any(text.startswith("TERM=") for text in env)
    return {} if said or "TERM" not in os.environ else {"TERM": os.environ["TERM"]}
