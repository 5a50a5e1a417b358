"""`taskvm run`: a new sandbox for one command, in this process or, detached, in the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

import click

import taskvm
from taskvm import UsageError
from taskvm.cli.asking import Asker
from taskvm.cli.attached import interactive_option, make_launch, name_option, start_held
from taskvm.cli.group import EXIT_FAILURE, EXIT_NO_READER, EXIT_TIMEOUT
from taskvm.cli.help import SandboxCommand, examples
from taskvm.cli.log import tell_refused
from taskvm.cli.options import SandboxArguments, published, sandbox_options
from taskvm.cli.review import Apply, Review, apply_option, diff_option
from taskvm.cli.streams import (
    STDIN,
    NoReaderError,
    occupy_standard_streams,
    relay,
    terminal_environment,
    until_signal,
)
from taskvm.terminal import DEFAULT_SIZE, Terminal


@click.command(
    short_help="Run a command in a new sandbox.",
    cls=SandboxCommand,
    context_settings={"allow_interspersed_args": False},
    epilog=examples(
        "taskvm run -- python3 -c 'print(6 * 7)'",
        "taskvm run --mount .:/workspace -- make test                this folder, read and written",
        "taskvm run --mount .:/workspace:review -t -- bash           its changes are shown, then applied",
        "taskvm run --allow index.example.org -- pip download -i https://index.example.org/simple six",
        "taskvm run --allow api.github.com --secret GH_TOKEN@api.github.com -- ./report",
        "taskvm run --detach --name tests --mount .:/workspace -- make test; taskvm logs -f tests",
    ),
)
@sandbox_options
@click.option("--tty", "-t", is_flag=True, help="Give the command a terminal.")
@interactive_option
@click.option("--detach", "-d", is_flag=True, help="Print the sandbox's id and leave it running.")
@click.option(
    "--ask", is_flag=True, help="Ask on this terminal about each host that no rule names."
)
@name_option
@apply_option
@diff_option
@click.argument("command", nargs=-1, required=True)
def run(
    arguments: SandboxArguments,
    tty: bool,
    interactive: bool,
    detach: bool,
    ask: bool,
    name: str | None,
    apply: Apply | None,
    diff_file: str | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND in a new sandbox, stream its output, and exit as it does.

    What it changed in mounts for review is shown and applied then; changes that should be and were not make the
    exit status 125.

    Options come before the command; `--` ends them. Values of secrets come from the environment, a file or a program,
    never from the command line.

    Exits with the command's own status (128 + the signal that ended it); 124 at the timeout, 125 when taskvm itself
    failed, 126 or 127 when the guest cannot run or does not have the command, 2 for wrong usage.
    """
    if not detach and (name is not None or arguments.idle_timeout is not None):
        option = "--name" if name is not None else "--idle-timeout"
        raise UsageError(f"use {option}", "the sandbox ends with this command", "Add --detach")
    if ask and (tty or detach):
        option = "--tty" if tty else "--detach"
        cause = "the terminal is the command's" if tty else "nobody is there to be asked"
        raise UsageError(f"use --ask with {option}", cause, "Leave one of them out")
    if detach:
        sys.exit(asyncio.run(until_signal(_detach(arguments, command, name, tty=tty))))
    review = Review.of(arguments.reviewed, apply, diff_file)
    with Asker() if ask else contextlib.nullcontext() as asker:
        _execute(arguments, command, review, asker, tty=tty)


def _execute(
    arguments: SandboxArguments,
    command: tuple[str, ...],
    review: Review,
    asker: Asker | None,
    *,
    tty: bool,
) -> None:
    """Run `command` in a new sandbox and exit as it does."""
    occupy_standard_streams()
    starting = arguments.create(oversight=asker.oversight if asker else None)
    taken: list[tuple[str, taskvm.ChangeSet]] = []
    records: list[tuple[Path, str]] = []

    async def work() -> int:
        async with starting as vm:
            records.append((vm.audit_path, vm.id))
            status = await _run(vm, arguments, command, asker.screen if asker else None, tty=tty)
            taken.extend(await review.take(vm))
        return status

    try:
        status = asyncio.run(until_signal(work()))
    except NoReaderError:
        status = EXIT_NO_READER
    if not arguments.quiet:
        for path, sandbox in records:
            tell_refused(path, sandbox)
    if len(taken) < len(review.paths):
        click.echo("taskvm: interrupted: the changes under review are dropped", err=True)
    elif not review.settle(taken):
        status = status or EXIT_FAILURE
    sys.exit(status)


async def _detach(
    arguments: SandboxArguments, command: tuple[str, ...], name: str | None, *, tty: bool
) -> int:
    launch = make_launch(arguments, command, DEFAULT_SIZE if tty else None, stdin=tty)
    click.echo((await start_held(arguments, launch, name)).id)
    return 0


async def _run(
    vm: taskvm.Sandbox,
    arguments: SandboxArguments,
    command: tuple[str, ...],
    screen: asyncio.Lock | None,
    *,
    tty: bool,
) -> int:
    ports = [published(text) for text in arguments.publish]
    for host_port, guest_port in ports:
        forward = await vm.forward(guest_port, host_port=host_port)
        click.echo(f"taskvm: port {guest_port} of the guest is at {forward}", err=True)
    terminal = Terminal(STDIN) if tty and os.isatty(STDIN) else None
    size = terminal.size if terminal else DEFAULT_SIZE
    async with await vm.spawn(
        list(command),
        cwd=arguments.cwd,
        env=terminal_environment(arguments.env) if tty else None,
        pty=size if tty else None,
        user=arguments.user,
        limits=arguments.limits,
    ) as process:
        try:
            async with asyncio.timeout(arguments.timeout):
                with terminal or contextlib.nullcontext():
                    return (await relay(process, terminal, screen=screen)).exit_code
        except TimeoutError:
            await process.kill_all()
            text = f"{process.command}: killed after {arguments.timeout:g} s"
            click.echo(f"taskvm: {text}", err=True)
            return EXIT_TIMEOUT
