"""`taskvm checkpoint`: save sandboxes, list, show and remove what was saved, and carry it to another host."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import click

import taskvm
from taskvm.cli import complete
from taskvm.cli.table import size, table


@click.group(short_help="Save sandboxes, to start others from them.")
def checkpoint() -> None:
    """Saved sandboxes: their disk, or their running programs too. `run --checkpoint NAME` starts from one."""


@checkpoint.command("create", short_help="Save a sandbox, which runs on.")
@click.option("--memory", is_flag=True, help="With the programs that run in it.")
@click.option("--stop", is_flag=True, help="End the sandbox then.")
@click.argument("sandbox", shell_complete=complete.sandboxes)
@click.argument("name", metavar="NAME|FILE")
def create(memory: bool, stop: bool, sandbox: str, name: str) -> None:
    """Save SANDBOX (of `taskvm ps`) under a name, or in a file (with a slash). It runs on."""
    saved = asyncio.run(taskvm.Supervisor().checkpoint(sandbox, name, memory=memory, stop=stop))
    click.echo(saved.path)


@checkpoint.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_(as_json: bool) -> None:
    """List the checkpoints of the store. Exits with 1 when one cannot be used."""
    store = taskvm.CheckpointStore()
    sound: list[taskvm.Checkpoint] = []
    damaged: dict[str, str] = {}
    for name in store.names():
        try:
            sound.append(store.get(name))
        except taskvm.CheckpointError as error:
            damaged[name] = error.cause
    if as_json:
        found = [_facts(each) for each in sound]
        found += [{"name": name, "damaged": cause} for name, cause in damaged.items()]
        click.echo(json.dumps(found, indent=2))
    elif sound:
        click.echo(
            table(("NAME", "SAVED", "SIZE", "CREATED", "IMAGE"), [_row(each) for each in sound])
        )
    elif not damaged:
        click.echo(
            "taskvm: no checkpoints yet; `taskvm checkpoint create SANDBOX NAME` makes one",
            err=True,
        )
    if not as_json:
        for name, cause in damaged.items():
            click.echo(f"{name}  DAMAGED  {cause}")
    sys.exit(1 if damaged else 0)


def _row(found: taskvm.Checkpoint) -> tuple[str, ...]:
    kind = "memory" if found.memory else "disk"
    return (found.name, kind, size(found.disk_bytes), found.created, found.image[:12])


@checkpoint.command("show")
@click.argument("name", metavar="NAME|FILE", shell_complete=complete.checkpoints)
def show(name: str) -> None:
    """Print what a checkpoint says of itself as JSON."""
    click.echo(json.dumps(_facts(taskvm.Checkpoint.load(name)), indent=2))


def _facts(found: taskvm.Checkpoint) -> dict[str, object]:
    return {
        "name": found.name,
        "path": str(found.path),
        "memory": found.memory,
        "disk_bytes": found.disk_bytes,
        "image": found.image,
        "sha256": found.sha256,
        "qemu_version": found.qemu_version,
        "arch": found.arch,
        "cpus": found.cpus,
        "memory_mib": found.memory_mib,
        "created": found.created,
    }


@checkpoint.command("rm")
@click.argument(
    "names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete.checkpoints
)
def remove(names: tuple[str, ...]) -> None:
    """Remove checkpoints from the store. Sandboxes that started from them run on."""
    store = taskvm.CheckpointStore()
    for name in names:
        store.remove(name)


@checkpoint.command("export", short_help="Write a disk checkpoint to a file.")
@click.argument("name", shell_complete=complete.checkpoints)
@click.argument("file", type=click.Path(path_type=Path))
def export(name: str, file: Path) -> None:
    """Write the disk checkpoint NAME to FILE, for a host with the same image."""
    taskvm.CheckpointStore().export(name, file)


@checkpoint.command("import", short_help="Take a disk checkpoint from a file.")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("name")
def import_(file: Path, name: str) -> None:
    """Take the disk checkpoint in FILE into the store, as NAME. It may come from anywhere."""
    taskvm.CheckpointStore().import_(file, name)
