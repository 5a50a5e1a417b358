"""The command line: `taskvm run`, `taskvm shell`, `taskvm image`, `taskvm doctor`.

A thin shell over the public names of the package.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import click

import taskvm
from taskvm import (
    ByteStream,
    Cache,
    HostDir,
    HostError,
    ImageError,
    ImageSpec,
    ImageStore,
    Process,
    Removed,
    Sandbox,
    SandboxLostError,
    Secret,
    TaskvmError,
    UsageError,
)
from taskvm import examine as examine_host
from taskvm.terminal import DEFAULT_SIZE, Terminal

P = ParamSpec("P")

# Exit statuses, besides those of the guest's command: 124 as timeout(1), 125 as env(1) for our own failures.
EXIT_TIMEOUT = 124
EXIT_FAILURE = 125
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # 128 + SIGPIPE, as every program in a pipe whose reader has gone

STDIN, STDOUT, STDERR = range(3)
LOGIN_SHELL = ("/bin/bash", "--login")


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


# What taskvm run and taskvm shell have in common


_SANDBOX_OPTIONS = (
    click.option(
        "--image",
        metavar="NAME",
        help="Image of the store (name or digest). [default: the standard image]",
    ),
    click.option("--cpus", default=2, show_default=True, help="Virtual CPUs."),
    click.option(
        "--memory", default=512, show_default=True, metavar="MIB", help="Guest memory in MiB."
    ),
    click.option(
        "--mount",
        "mounts",
        multiple=True,
        metavar="HOST:GUEST[:ro]",
        help="Mount a host directory, read-write or read-only.",
    ),
    click.option(
        "--allow",
        multiple=True,
        metavar="HOST",
        help="A host that may be reached: example.com, *.example.com, with :PORT or not.",
    ),
    click.option(
        "--allow-address",
        "allow_addresses",
        multiple=True,
        metavar="ADDRESS",
        help="An internal address or network that an allowed name may lead to, such as 127.0.0.1:8443.",
    ),
    click.option(
        "--resolve",
        multiple=True,
        metavar="HOST=ADDRESS",
        help="Use ADDRESS for HOST instead of looking it up.",
    ),
    click.option(
        "--secret",
        "secrets",
        multiple=True,
        metavar="NAME@HOST[,HOST…]",
        help="Send the value of the variable NAME to these hosts; the guest sees a placeholder in $NAME.",
    ),
    click.option(
        "--secret-file",
        "secret_files",
        multiple=True,
        metavar="NAME=FILE@HOST[,HOST…]",
        help="The same with the value from FILE.",
    ),
    click.option(
        "--ca-file",
        "ca_files",
        multiple=True,
        metavar="PEM",
        help="Verify servers with these certificates too.",
    ),
    click.option("--env", "env", multiple=True, metavar="K=V", help="Set a variable in the guest."),
    click.option(
        "--cwd",
        metavar="DIR",
        help="Working directory in the guest. [default: /workspace if mounted]",
    ),
    click.option(
        "--timeout",
        type=float,
        metavar="S",
        help="Kill the command after S seconds (exit status 124).",
    ),
    click.option(
        "--max-duration", type=float, metavar="S", help="End the whole sandbox after S seconds."
    ),
    click.option(
        "--publish",
        multiple=True,
        metavar="[HOST_PORT:]GUEST_PORT",
        help="Make a TCP server in the guest reachable at 127.0.0.1 of this host.",
    ),
    click.option(
        "--audit", metavar="FILE", help="Append each egress decision to FILE as a JSON line."
    ),
    click.option(
        "--accel",
        type=click.Choice(["auto", "kvm", "tcg"]),
        default="auto",
        show_default=True,
        help="What runs the guest.",
    ),
    click.option("--cold", is_flag=True, help="Boot instead of starting from a warm template."),
    click.option("--quiet", "-q", is_flag=True, help="No progress on standard error."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxArguments:
    """What the user said about the sandbox, and about the command's place in it."""

    image: str | None
    cpus: int
    memory: int
    mounts: tuple[str, ...]
    allow: tuple[str, ...]
    allow_addresses: tuple[str, ...]
    resolve: tuple[str, ...]
    secrets: tuple[str, ...]
    secret_files: tuple[str, ...]
    ca_files: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str | None
    timeout: float | None
    max_duration: float | None
    publish: tuple[str, ...]
    audit: str | None
    accel: str
    cold: bool
    quiet: bool

    def create(self) -> taskvm.Starting:
        """Return the sandbox, to be started. Raises UsageError."""
        if self.timeout is not None and not self.timeout > 0:  # so that "nan" is refused too
            raise UsageError(
                f"use --timeout {self.timeout:g}", "it is not a positive number of seconds"
            )
        return Sandbox.create(
            mounts=dict(_mount(text) for text in self.mounts),
            allow=self.allow,
            allow_addresses=self.allow_addresses,
            resolve=dict(_pair(text, "--resolve", "HOST=ADDRESS") for text in self.resolve),
            secrets=[*map(_secret, self.secrets), *map(_secret_file, self.secret_files)],
            extra_ca_files=[Path(path) for path in self.ca_files],
            env=dict(_pair(text, "--env", "K=V") for text in self.env),
            audit_path=self.audit,
            image=self.image,
            cpus=self.cpus,
            memory_mib=self.memory,
            accel=self.accel,  # type: ignore[arg-type]  # click.Choice has checked it
            warm=not self.cold,
            max_duration_s=self.max_duration,
            on_progress=_silent if self.quiet else _progress,
        )


def sandbox_options(
    command: Callable[Concatenate[SandboxArguments, P], None],
) -> Callable[..., None]:
    """Give `command` the options of a sandbox; it gets them as one value."""

    @functools.wraps(command)
    def collect(*args: P.args, **values: P.kwargs) -> None:
        own = {field.name: values.pop(field.name) for field in fields(SandboxArguments)}
        command(SandboxArguments(**own), *args, **values)  # type: ignore[arg-type]  # click has converted them

    for option in reversed(_SANDBOX_OPTIONS):
        collect = option(collect)
    return collect


# taskvm run, taskvm shell

_COMMAND_SETTINGS = {"ignore_unknown_options": False, "allow_interspersed_args": False}


@main.command(
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


@main.command(
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
    _occupy_standard_streams()
    starting = arguments.create()
    try:
        status = asyncio.run(_until_signal(_run(starting, arguments, command, tty=tty)))
    except _NoReaderError:
        status = EXIT_NO_READER
    sys.exit(status)


async def _run(
    starting: taskvm.Starting,
    arguments: SandboxArguments,
    command: tuple[str, ...],
    *,
    tty: bool,
) -> int:
    ports = [_published(text) for text in arguments.publish]
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
                        return await _relay(process, terminal)
            except TimeoutError:
                await process.kill_all()
                text = f"{process.command}: killed after {arguments.timeout:g} s"
                click.echo(f"taskvm: {text}", err=True)
                return EXIT_TIMEOUT


def _terminal_environment(env: Iterable[str]) -> dict[str, str]:
    """Tell the guest which terminal this is, unless the user said another."""
    said = any(text.startswith("TERM=") for text in env)
    return {} if said or "TERM" not in os.environ else {"TERM": os.environ["TERM"]}


async def _until_signal(work: Coroutine[Any, Any, int]) -> int:
    """Do the work; SIGTERM and SIGHUP cancel it as Ctrl-C does, so that the sandbox is released."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None, "this is a coroutine of asyncio.run"
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) ignores SIGHUP
            loop.add_signal_handler(number, end, number)
    try:
        return await work
    except asyncio.CancelledError:
        if not received:
            raise
        return 128 + received[0]


class _NoReaderError(Exception):
    """Whoever read our output has gone, as `head` does when it has seen enough."""


async def _relay(process: Process, terminal: Terminal | None) -> int:
    try:
        async with asyncio.TaskGroup() as group:
            endless = [group.create_task(_feed(process))]
            if terminal is not None:
                endless.append(group.create_task(terminal.follow(process.resize)))
            outputs = [
                group.create_task(_copy(process.stdout, STDOUT)),
                group.create_task(_copy(process.stderr, STDERR)),
            ]
            result = await process.wait()
            await asyncio.wait(outputs)
            for task in endless:
                task.cancel()
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # the others say the same, or follow from it
    return result.exit_code


async def _copy(stream: ByteStream, descriptor: int) -> None:
    async for data in stream:
        await asyncio.to_thread(_write_all, descriptor, data)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError as error:
        raise _NoReaderError from error
    except OSError as error:
        raise HostError("write the command's output", error.strerror or str(error)) from error


def _occupy_standard_streams() -> None:
    """Give /dev/null the number of a standard stream that is closed (`>&-`).

    The next file to be opened would get that number, and the guest's output would go there.
    """
    for descriptor in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


async def _feed(process: Process) -> None:
    """Pass standard input on. Nothing is read ahead of what the guest takes."""
    read = _read_ready if _is_pollable(STDIN) else _read_file
    try:
        while data := await read(STDIN):
            await process.write(data)
        await process.close_stdin()
    except (OSError, SandboxLostError):
        return  # the process has ended, or reads no more


def _is_pollable(descriptor: int) -> bool:
    """Regular files and some devices, such as /dev/null, are not (epoll_ctl(2), EPERM): they never block either."""
    with select.epoll() as poll:
        try:
            poll.register(descriptor)
        except OSError:
            return False
    return True


async def _read_ready(descriptor: int) -> bytes:
    # Not by an asyncio pipe: that would make a terminal non-blocking, and with it standard output.
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, 65536)


async def _read_file(descriptor: int) -> bytes:
    return await asyncio.to_thread(os.read, descriptor, 65536)


# taskvm image


@main.group(short_help="Build, list and show guest images.")
def image() -> None:
    """Guest images: kernel, modules and root file system, named by digest."""


@image.command("build")
@click.option(
    "--mirror", metavar="URL", help="Debian archive to use. [default: the host's own apt sources]"
)
@click.option("--suite", default=ImageSpec().suite, show_default=True, help="Debian suite.")
@click.option("--include", multiple=True, metavar="PKG", help="A further package to install.")
@click.option("--name", metavar="NAME", help="Give the image a name.")
def image_build(mirror: str | None, suite: str, include: tuple[str, ...], name: str | None) -> None:
    """Build a guest image (about a minute), whether or not it was built before."""
    store = ImageStore()
    built = store.build(ImageSpec(suite=suite, mirror=mirror, include=include), _progress)
    if name is not None:
        store.tag(built, name)
    click.echo(built.digest)


@image.command("list")
def image_list() -> None:
    """List the images of the store."""
    store = ImageStore()
    names: dict[str, list[str]] = {}
    for ref, digest in store.refs().items():
        names.setdefault(digest, []).append(ref)
    for item in store.list():
        manifest = item.manifest
        click.echo(
            f"{item.digest[:12]}  {manifest.arch}  {item.disk_bytes >> 20:5} MiB  {manifest.created}  "
            f"{', '.join(sorted(names.get(item.digest, [])))}"
        )


@image.command("show")
@click.argument("name")
def image_show(name: str) -> None:
    """Print the manifest of the image NAME (a name, a digest, or the start of a digest) as JSON."""
    click.echo(ImageStore().get(name).manifest.to_json())


@image.command("verify")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def image_verify(names: tuple[str, ...]) -> None:
    """Read every file of the images (default: all) and compare it with the manifest. Exits with 1 on damage."""
    store = ImageStore()
    damaged = False
    for name in names or store.digests():
        try:
            found = store.get(name)
            store.verify(found)
        except ImageError as error:
            damaged = True
            click.echo(f"DAMAGED  {name[:12]}  {error}")
        else:
            click.echo(f"ok       {found.digest[:12]}  {len(found.manifest.assets)} files")
    sys.exit(1 if damaged else 0)


@image.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def image_rm(names: tuple[str, ...]) -> None:
    """Remove images, all their names, and the templates made from them. One that a sandbox uses stays."""
    cache = Cache()
    for name in names:
        _report(cache.remove(name, _progress))


@image.command("prune")
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Keep the N newest images without a name.",
)
def image_prune(keep: int) -> None:
    """Remove what no start will use again: images without a name, stale templates, old initial file systems, and
    what killed processes left.
    """
    _report(Cache().prune(keep, _progress))


def _report(removed: Iterable[Removed]) -> None:
    size = 0
    for item in removed:
        size += item.size_bytes
        click.echo(f"removed {item.what}: {item.size_bytes / 1024**2:.1f} MiB")
    click.echo(f"freed {size / 1024**2:.1f} MiB")


# taskvm doctor


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def doctor(as_json: bool) -> None:
    """Explain what this host can do, and what is in the way. Exits with 1 when no sandbox can start."""
    findings = asyncio.run(examine_host())
    if as_json:
        click.echo(taskvm.render_findings(findings))
    else:
        marks = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
        for finding in findings:
            click.echo(f"{marks[finding.status]} {finding.name:12} {finding.text}")
            if finding.remedy:
                click.echo(f"{'':19}{finding.remedy}")
    sys.exit(1 if any(finding.status == "fault" for finding in findings) else 0)


# Reading options...


def _mount(text: str) -> tuple[str, HostDir]:
    parts = text.split(":")
    if len(parts) == 3 and parts[2] in ("ro", "rw"):
        host, guest, mode = parts
    elif len(parts) == 2:
        (host, guest), mode = parts, "rw"
    else:
        raise UsageError(f"read --mount {text}", "it is not HOST:GUEST or HOST:GUEST:ro")
    return guest, HostDir(host or ".", mode="ro" if mode == "ro" else "direct")


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UsageError(f"read {option} {text}", f"it is not {form}")
    return name, value


def _published(text: str) -> tuple[int, int]:
    host_port, separator, guest_port = text.rpartition(":")
    numbers = [guest_port, host_port] if separator else [guest_port]
    if not all(number.isdecimal() and 0 < int(number) < 65536 for number in numbers):
        raise UsageError(f"read --publish {text}", "it is not GUEST_PORT or HOST_PORT:GUEST_PORT")
    return int(host_port) if separator else 0, int(guest_port)


def _secret(text: str) -> Secret:
    name, separator, hosts = text.partition("@")
    if "=" in text:
        # The text may hold the value itself: it is not repeated.
        raise UsageError(
            "read --secret",
            "a value does not belong on the command line, where every user of this host can read it",
            "Put it into the environment and write --secret NAME@HOST",
        )
    if not separator:
        raise UsageError(f"read --secret {text}", "it is not NAME@HOST[,HOST…]")
    return Secret.from_env(name, hosts=_hosts(hosts))


def _secret_file(text: str) -> Secret:
    name, equals, rest = text.partition("=")
    path, separator, hosts = rest.rpartition("@")
    if not (name and equals and path and separator):
        raise UsageError(f"read --secret-file {text}", "it is not NAME=FILE@HOST[,HOST…]")
    return Secret.from_file(path, name=name, hosts=_hosts(hosts))


def _hosts(text: str) -> Iterable[str]:
    return [host for host in text.split(",") if host]


def _progress(line: str) -> None:
    click.echo(f"taskvm: {line}", err=True)


def _silent(line: str) -> None:
    """For --quiet."""


if __name__ == "__main__":
    main()
