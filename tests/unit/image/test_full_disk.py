"""taskvm.image.store on a disk that fills at any step of a build: an error of ours, and nothing is left of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.small_disk import MIB, fill, small_disk
from tests.unit.image.test_kernel import pack, tree
from tests.unit.image.test_rootfs import root_tar

from taskvm.errors import HostError, ImageError
from taskvm.image import build as build_module
from taskvm.image.manifest import Image, ImageSpec
from taskvm.image.store import ImageStore

# What the builds here make takes some 5 MiB.
SIZE_MIB = 48
# As progress names the steps; after the last one the manifest is written, all is synced, and gets its names.
STEPS = (
    "unpacking the kernel",
    "making the root file system",
    "built kernel",
    "computing digests",
)

__all__ = ["root_tar", "tree"]  # fixtures


@pytest.fixture
def store(
    tree: Path, root_tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ImageStore]:
    """A store on a small disk, whose builds are real but for mmdebstrap: tiny packages are there at once."""
    package = pack(tree)

    def build_debian(spec: ImageSpec, directory: Path, progress: object) -> None:
        shutil.copyfile(root_tar, directory / "root.tar")
        shutil.copyfile(package, directory / "kernel.deb")

    monkeypatch.setattr(build_module, "build_debian", build_debian)
    monkeypatch.setattr(build_module, "_NEEDED_BYTES", 0)
    with small_disk(tmp_path / "small", SIZE_MIB) as small:
        yield ImageStore(small / "cache")


def build(store: ImageStore, full_at: str | None) -> Image:
    def progress(line: str) -> None:
        if full_at is not None and line.startswith(full_at):
            fill(store.root.parent)

    return store.build(ImageSpec(size_mib=512), progress)


@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_fills_in_a_build_is_an_error_that_leaves_nothing(
    store: ImageStore, step: str
) -> None:
    """The store is as before, the room is there again, and a build that has it succeeds."""
    with pytest.raises((ImageError, HostError), match="No space left|not enough space|full"):
        build(store, step)

    assert store.list() == []
    assert store.refs() == {}
    assert sorted(path.name for path in store.root.iterdir()) == ["images", "lock", "refs"]
    (store.root.parent / "filler").unlink()
    assert shutil.disk_usage(store.root).used < MIB
    store.verify(build(store, None))


def test_a_full_disk_takes_no_image_that_was_there(store: ImageStore) -> None:
    """A build of an image that has one fails, and the one that it would have replaced stays whole."""
    image = build(store, None)

    for step in STEPS[-2:]:
        with pytest.raises((ImageError, HostError)):
            build(store, step)
        (store.root.parent / "filler").unlink()

    assert store.list() == [image]
    store.verify(image)
