"""`taskvm image`: build, list, show, verify and remove guest images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

import click

import taskvm
from taskvm import ImageError, ImageSpec
from taskvm.cli import complete
from taskvm.cli.group import progress
from taskvm.cli.table import size, table


@click.group(short_help="Build, list and show guest images.")
def image() -> None:
    """Guest images: kernel, modules and root file system, named by digest."""


@image.command("build", short_help="Build a guest image: about a minute.")
@click.option(
    "--mirror", metavar="URL", help="Debian archive to use. [default: the host's own apt sources]"
)
@click.option("--suite", default=ImageSpec().suite, show_default=True, help="Debian suite.")
@click.option("--include", multiple=True, metavar="PKG", help="A further package to install.")
@click.option(
    "--arch",
    type=click.Choice(["x86_64", "aarch64"]),
    default=ImageSpec().arch,
    help="Processor of the guest. [default: this host's]",
)
@click.option("--name", metavar="NAME", help="Give the image a name.")
def image_build(
    mirror: str | None, suite: str, include: tuple[str, ...], arch: str, name: str | None
) -> None:
    """Build a guest image (about a minute), whether or not it was built before."""
    store = taskvm.ImageStore()
    built = store.build(ImageSpec(suite=suite, mirror=mirror, include=include, arch=arch), progress)
    if name is not None:
        store.tag(built, name)
    click.echo(built.digest)


@image.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def image_list(as_json: bool) -> None:
    """List the images of the store, the newest first. Exits with 1 when one is damaged."""
    store = taskvm.ImageStore()
    names: dict[str, list[str]] = {}
    for ref, digest in sorted(store.refs().items()):
        names.setdefault(digest, []).append(ref)
    sound: list[taskvm.Image] = []
    damaged: dict[str, str] = {}
    for digest in store.digests():
        try:
            sound.append(store.get(digest))
        except ImageError as error:
            damaged[digest] = error.cause
    sound.sort(key=lambda image: image.manifest.created, reverse=True)
    if as_json:
        click.echo(json.dumps(_as_json(sound, damaged, names), indent=2))
    elif sound:
        rows = [_row(each, names.get(each.digest, [])) for each in sound]
        click.echo(table(("DIGEST", "ARCH", "SIZE", "CREATED", "NAMES"), rows))
    elif not damaged:
        click.echo("taskvm: no images yet; the first sandbox builds one", err=True)
    if not as_json:
        for digest, cause in damaged.items():
            click.echo(f"{digest[:12]}  DAMAGED  {cause}")
    sys.exit(1 if damaged else 0)


def _row(image: taskvm.Image, names: list[str]) -> tuple[str, ...]:
    manifest = image.manifest
    return (
        image.digest[:12],
        manifest.arch,
        size(image.disk_bytes),
        manifest.created,
        ", ".join(names),
    )


def _as_json(
    sound: list[taskvm.Image], damaged: dict[str, str], names: dict[str, list[str]]
) -> list[dict[str, object]]:
    found: list[dict[str, object]] = [
        {
            "digest": each.digest,
            "names": names.get(each.digest, []),
            "arch": each.manifest.arch,
            "disk_bytes": each.disk_bytes,
            "created": each.manifest.created,
        }
        for each in sound
    ]
    return found + [
        {"digest": digest, "names": names.get(digest, []), "damaged": cause}
        for digest, cause in damaged.items()
    ]


@image.command("show", short_help="Print what an image says of itself as JSON.")
@click.argument("name", shell_complete=complete.images)
def image_show(name: str) -> None:
    """Print the manifest of the image NAME (a name, a digest, or the start of a digest) as JSON."""
    click.echo(taskvm.ImageStore().get(name).manifest.to_json())


@image.command("verify", short_help="Compare every file of images with what it was.")
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete.images)
def image_verify(names: tuple[str, ...]) -> None:
    """Read every file of the images (default: all) and compare it with the manifest. Exits with 1 on damage."""
    store = taskvm.ImageStore()
    damaged = False
    known = {*store.refs(), *store.digests()}
    for name in names or store.digests():
        if not any(each.startswith(name) for each in known):
            store.get(name)  # raises: what is not there is not damaged
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
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete.images)
def image_rm(names: tuple[str, ...]) -> None:
    """Remove images, all their names, and the templates made from them. One that a sandbox uses stays, or that a
    checkpoint of the store lies above.
    """
    cache = taskvm.Cache()
    for name in names:
        _report(cache.remove(name, progress))


@image.command("prune", short_help="Remove what no start will use again.")
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Keep the N newest images without a name.",
)
def image_prune(keep: int) -> None:
    """Remove what no start will use again: images without a name, stale templates, old initial file systems, disks of
    checkpoints that are gone, and what killed processes left. An image that a checkpoint of the store lies above stays;
    one that only checkpoints elsewhere need does not.
    """
    _report(taskvm.Cache().prune(keep, progress))


def _report(removed: Iterable[taskvm.Removed]) -> None:
    freed = 0
    for item in removed:
        freed += item.size_bytes
        click.echo(f"removed {item.what}: {item.size_bytes / 1024**2:.1f} MiB")
    click.echo(f"freed {freed / 1024**2:.1f} MiB")
