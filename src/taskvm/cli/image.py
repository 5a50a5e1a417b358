"""`taskvm image`: build, list, show, verify and remove guest images."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click

import taskvm
from taskvm import ImageError, ImageSpec
from taskvm.cli.group import progress


@click.group(short_help="Build, list and show guest images.")
def image() -> None:
    """Guest images: kernel, modules and root file system, named by digest."""


@image.command("build")
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
def image_list() -> None:
    """List the images of the store, the newest first. Exits with 1 when one is damaged."""
    store = taskvm.ImageStore()
    names: dict[str, list[str]] = {}
    for ref, digest in store.refs().items():
        names.setdefault(digest, []).append(ref)
    sound: list[taskvm.Image] = []
    damaged: list[str] = []
    for digest in store.digests():
        try:
            sound.append(store.get(digest))
        except ImageError as error:
            damaged.append(f"{digest[:12]}  DAMAGED  {error.cause}")
    for item in sorted(sound, key=lambda image: image.manifest.created, reverse=True):
        manifest = item.manifest
        click.echo(
            f"{item.digest[:12]}  {manifest.arch}  {item.disk_bytes >> 20:5} MiB  {manifest.created}  "
            f"{', '.join(sorted(names.get(item.digest, [])))}"
        )
    for line in damaged:
        click.echo(line)
    sys.exit(1 if damaged else 0)


@image.command("show")
@click.argument("name")
def image_show(name: str) -> None:
    """Print the manifest of the image NAME (a name, a digest, or the start of a digest) as JSON."""
    click.echo(taskvm.ImageStore().get(name).manifest.to_json())


@image.command("verify")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def image_verify(names: tuple[str, ...]) -> None:
    """Read every file of the images (default: all) and compare it with the manifest. Exits with 1 on damage."""
    store = taskvm.ImageStore()
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
    cache = taskvm.Cache()
    for name in names:
        _report(cache.remove(name, progress))


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
    _report(taskvm.Cache().prune(keep, progress))


def _report(removed: Iterable[taskvm.Removed]) -> None:
    size = 0
    for item in removed:
        size += item.size_bytes
        click.echo(f"removed {item.what}: {item.size_bytes / 1024**2:.1f} MiB")
    click.echo(f"freed {size / 1024**2:.1f} MiB")
