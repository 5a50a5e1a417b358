"""taskvm.image, built for real: killed at several points, then whole, and again with the same result.

Takes minutes: packages come from the host's own mirror, as for every image.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The default image, in a store where earlier builds of it were killed."""
    store = ImageStore(tmp_path_factory.mktemp("store") / "cache")
    for point in POINTS:
        assert kill_build(store.root, point) == -signal.SIGKILL
        assert store.list() == []
        assert store.refs() == {}
    return store.build(ImageSpec(), print)


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
