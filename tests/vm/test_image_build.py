"""taskvm.image, built for real: killed at several points, then whole, and again with the same result.

Takes minutes: packages come from the host's own mirror, as for every image.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.waiting import wait_until

from taskvm.image import build as build_module
from taskvm.image.build import BuiltAssets, build_assets
from taskvm.image.debian import build_debian
from taskvm.image.manifest import Image, ImageSpec
from taskvm.image.store import ImageStore

pytestmark = pytest.mark.timeout(1800)

BUILD = """
import sys
from pathlib import Path
from taskvm.image.manifest import ImageSpec
from taskvm.image.store import ImageStore

ImageStore(Path(sys.argv[1])).build(ImageSpec(), lambda line: print(line, flush=True))
"""
# As progress names them: packages are being fetched, and the new root is being changed.
POINTS = ("20 of ", "setting the guest up")
# What comes after the packages, with those of a build before: seconds. It ends itself by SIGKILL when
# it calls a function of a module for the n-th time.
REST = """
import importlib, os, signal, sys
from pathlib import Path
from taskvm.image import build
from taskvm.image.manifest import ImageSpec
from taskvm.image.store import ImageStore

root, kept = Path(sys.argv[1]), Path(sys.argv[2])
module, name, nth = sys.argv[3].split(":")
calls, original = [0], getattr(importlib.import_module(module), name)

def counted(*args):
    calls[0] += 1
    if calls[0] == int(nth):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

def build_debian(spec, directory, progress):
    for file in ("root.tar", "kernel.deb"):
        os.link(kept / file, directory / file)

setattr(importlib.import_module(module), name, counted)
build.build_debian = build_debian
ImageStore(root).build(ImageSpec(), lambda line: print(line, flush=True))
"""
LATER = {
    "the kernel's package is unpacked": "taskvm.image.kernel:load_order:1",
    "some digests are computed": "taskvm.image.store:measure_asset:3",
    "the image has its place and no name": "taskvm.image.store:replace_file:1",
}


def kill_build(root: Path, point: str) -> int:
    """Build in another process, end it with SIGKILL when it says `point`, and return its status."""
    argv = [sys.executable, "-c", BUILD, str(root)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(point):
                process.kill()
                break
    return process.returncode


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of the build below, kept for those that begin where it had them."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> Image:
    """The default image, in a store where earlier builds of it were killed."""

    def keep(spec: ImageSpec, directory: Path, progress: Callable[[str], None]) -> None:
        build_debian(spec, directory, progress)
        for file in ("root.tar", "kernel.deb"):
            os.link(directory / file, kept / file)

    def build(spec: ImageSpec, target: Path, progress: Callable[[str], None]) -> BuiltAssets:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_module, "build_debian", keep)
            return build_assets(spec, target, progress)

    store = ImageStore(tmp_path_factory.mktemp("store") / "cache", builder=build)
    for point in POINTS:
        assert kill_build(store.root, point) == -signal.SIGKILL
        assert store.list() == []
        assert store.refs() == {}
    return store.build(ImageSpec(), print)


def rest_of_build(root: Path, kept: Path, until: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", REST, str(root), str(kept), until], stdout=subprocess.DEVNULL
    )


def test_a_build_that_is_killed_after_the_packages_leaves_a_store_that_works(
    image: Image, kept: Path, tmp_path: Path
) -> None:
    """At each step nothing half made can be found, and the build after all of them is the same image."""
    store = ImageStore(tmp_path / "cache")
    for point in LATER.values():
        with rest_of_build(store.root, kept, point) as process:
            assert process.wait() == -signal.SIGKILL
        for found in store.list():  # only once it has its place
            store.verify(found)
        assert store.refs() == {}
        assert len(store.list()) == ("replace_file" in point)
    store.remove(image.digest, print)
    # Killed while mke2fs writes, which goes on for a while; by itself where we are too late.
    with rest_of_build(store.root, kept, "taskvm.image.store:measure_asset:1") as process:
        wait_until(
            lambda: any(file.stat().st_size for file in store.root.glob("staging/*/rootfs.ext4"))
        )
        process.kill()
    assert store.list() == []

    with rest_of_build(store.root, kept, "taskvm.image.store:replace_file:9") as process:
        assert process.wait() == 0

    (whole,) = store.list()
    store.verify(whole)
    assert whole.digest == image.digest
    assert set(store.refs().values()) == {whole.digest}
    assert sorted(path.name for path in store.root.iterdir()) == ["images", "lock", "refs"]


def test_a_build_after_killed_ones_is_whole_and_nothing_of_them_stays(image: Image) -> None:
    store = ImageStore(image.path.parent.parent)

    store.verify(image)
    assert store.list() == [image]
    assert sorted(path.name for path in store.root.iterdir()) == ["images", "lock", "refs"]


def test_the_same_packages_give_the_same_digest(image: Image, tmp_path: Path) -> None:
    """Built elsewhere, at another time: in this user's store, unless the archive has newer packages since."""
    other = ImageStore().ensure(ImageSpec(), print)
    if other.manifest.packages != image.manifest.packages:
        other = ImageStore(tmp_path / "cache").build(ImageSpec(), print)

    assert other.manifest.packages == image.manifest.packages
    assert other.digest == image.digest
