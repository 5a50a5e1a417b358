"""`taskvm supervisor`: the process that holds the sandboxes which outlive their command lines."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from collections.abc import Callable
from logging.handlers import RotatingFileHandler

import click

import taskvm
from taskvm import HostError, Supervisor, UsageError
from taskvm.cli.options import SandboxArguments, published
from taskvm.supervisor.holding import Recipe
from taskvm.supervisor.place import Place
from taskvm.supervisor.server import Server
from taskvm.wire.supervision import StartRequest

# Starts, ends and failures of sandboxes are a line each; one older file of this size is kept.
LOG_BYTES = 256 * 1024
# A sandbox takes some twenty, and each mount more: the usual 1024 would do for fifty.
DESCRIPTORS = 16384


@click.group(short_help="The process that holds detached sandboxes.")
def supervisor() -> None:
    """The supervisor: one process per user that holds the sandboxes of shell, start and run --detach. It is started
    when one is needed, and ends a minute after the last one is forgotten.
    """


@supervisor.command("status")
def status() -> None:
    """Tell about the supervisor that runs. Exits with 1 when none does."""
    found = asyncio.run(Supervisor().status())
    if found is None:
        click.echo("no supervisor runs")
        raise SystemExit(1)
    click.echo(
        f"supervisor {found.version}, process {found.pid}, up {found.age_s:.0f} s, "
        f"{found.sandboxes} sandboxes, in {found.directory}"
    )


@supervisor.command("stop")
def stop() -> None:
    """End the supervisor and all its sandboxes."""
    stopped = asyncio.run(Supervisor().shut_down())
    click.echo("stopped" if stopped else "no supervisor runs")


@supervisor.command("run")
@click.option(
    "--linger",
    type=float,
    default=60.0,
    show_default=True,
    metavar="S",
    help="End after S idle seconds.",
)
@click.option("--lock", type=int, hidden=True, help="Descriptor of the lock, from who starts it.")
@click.option("--ready", type=int, hidden=True, help="Descriptor to say so on, when it listens.")
def run(linger: float, lock: int | None, ready: int | None) -> None:
    """Be the supervisor, in the foreground. Commands start one by themselves: this is for a service manager."""
    place = Place.of_user()
    if lock is None and place.lock() is None:  # held until this process ends
        raise HostError(
            f"serve {place.directory}", "a supervisor runs already", "taskvm supervisor stop"
        )
    if ready is not None and os.fork():
        os._exit(0)  # who started it waits for this one
    _log_to(place, foreground=ready is None)
    _raise_descriptor_limit()
    asyncio.run(_serve(Server(place, make_recipe, taskvm.__version__, linger), ready))


async def _serve(server: Server, ready: int | None) -> None:
    def on_ready() -> None:
        if ready is not None:
            os.write(ready, b"ready\n")
            os.close(ready)

    await server.run(on_ready)


def make_recipe(request: StartRequest, on_progress: Callable[[str], None]) -> Recipe:
    """Return the sandbox that `request` asks for, to be started. Raises UsageError."""
    arguments = SandboxArguments.of(request.options)
    if SandboxArguments.of(arguments.portable()) != arguments:
        # "." would be this process's own working directory, which is "/".
        raise UsageError(
            "start a sandbox in the supervisor", "a path is relative", "Write absolute paths"
        )
    return Recipe(
        starting=arguments.create(request.variables, on_progress),
        image=arguments.image,
        idle_timeout_s=arguments.idle_timeout,
        max_duration_s=arguments.max_duration,
        ports=[published(text) for text in arguments.publish],
    )


def _raise_descriptor_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if most == resource.RLIM_INFINITY else min(DESCRIPTORS, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _log_to(place: Place, *, foreground: bool) -> None:
    handlers: list[logging.Handler] = [
        RotatingFileHandler(place.log, maxBytes=LOG_BYTES, backupCount=1)
    ]
    if foreground:
        handlers.append(logging.StreamHandler())
    text = "%(asctime)s %(process)d %(levelname)s %(message)s"
    logging.basicConfig(handlers=handlers, level=logging.INFO, format=text)
