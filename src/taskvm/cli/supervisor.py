"""`taskvm supervisor`: the process that holds the sandboxes which outlive their command lines."""

from __future__ import annotations

import asyncio
import os

import click

import taskvm
from taskvm import HostError
from taskvm.supervisor.place import Place


@click.group(short_help="The process that holds detached sandboxes.")
def supervisor() -> None:
    """The supervisor: one process per user that holds the sandboxes of shell, start and run --detach. It is started
    when one is needed, and ends a minute after the last one is forgotten.
    """


@supervisor.command("status")
def status() -> None:
    """Tell about the supervisor that runs. Exits with 1 when none does."""
    found = asyncio.run(taskvm.Supervisor().status())
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
    stopped = asyncio.run(taskvm.Supervisor().shut_down())
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
    from taskvm.cli.serving import serve  # the engine, which no other command here needs

    place = Place.of_user()
    if lock is None and place.lock() is None:  # held until this process ends
        raise HostError(
            f"serve {place.directory}", "a supervisor runs already", "taskvm supervisor stop"
        )
    if ready is not None and os.fork():
        os._exit(0)  # who started it waits for this one
    serve(place, linger, ready)
