"""taskvm.image.store: images appear whole or not at all, once, and are found by name and digest."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.support.waiting import PATIENCE_S, wait_until

from taskvm import paths as paths_module
from taskvm.errors import HostError, ImageError, UsageError
from taskvm.image import store as store_module
from taskvm.image.build import BuiltAssets
from taskvm.image.manifest import Image, ImageSpec
from taskvm.image.store import ImageStore, Progress
from taskvm.paths import cache_path

SPEC = ImageSpec(arch="x86_64")


def silent(_line: str) -> None:
    """Progress nobody reads."""


class Builder:
    """Builds a tiny image; `kernel` is its only content that matters. Counts its runs."""

    def __init__(self, kernel: bytes = b"kernel") -> None:
        self.kernel = kernel
        self.runs = 0

    def __call__(self, spec: ImageSpec, target: Path, progress: Progress) -> BuiltAssets:
        self.runs += 1
        (target / "vmlinuz").write_bytes(self.kernel)
        (target / "modules").mkdir()
        (target / "modules" / "00-virtio.ko").write_bytes(b"module")
        (target / "rootfs.ext4").write_bytes(b"root")
        return BuiltAssets("6.1", {"libc6": "1"})


@pytest.fixture
def builder() -> Builder:
    return Builder()


@pytest.fixture
def store(tmp_path: Path, builder: Builder) -> ImageStore:
    return ImageStore(tmp_path / "cache", builder=builder)


@pytest.fixture
def image(store: ImageStore) -> Image:
    return store.ensure(SPEC, silent)


def test_an_image_is_built_once(store: ImageStore, builder: Builder) -> None:
    first = store.ensure(SPEC, silent)
    second = store.ensure(SPEC, silent)

    assert first == second
    assert builder.runs == 1


def test_a_name_that_is_removed_while_names_are_read_is_none(
    store: ImageStore, image: Image
) -> None:
    """Each start reads all names; another process may be removing an image."""
    (store.root / "refs" / "going").symlink_to("gone")  # listed, and not there when it is read

    assert store.get("default") == image
    assert store.names() == ("default",)


def test_an_image_that_is_removed_while_images_are_listed_is_none(
    store: ImageStore, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = store._load

    def load_late(digest: str) -> Image:
        store.remove(digest, silent)
        return load(digest)

    monkeypatch.setattr(store, "_load", load_late)

    assert store.list() == []


def test_an_image_is_found_by_name_digest_and_the_start_of_its_digest(
    store: ImageStore, image: Image
) -> None:
    store.tag(image, "mine")

    found = [store.get(name) for name in ("mine", "default", image.digest, image.digest[:12])]

    assert found == [image] * 4


def test_the_store_is_private_and_its_images_cannot_be_written(
    store: ImageStore, image: Image
) -> None:
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(image.rootfs.stat().st_mode) == 0o400


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_directory_that_others_can_write_is_no_store(store: ImageStore, mode: int) -> None:
    store.root.mkdir()
    store.root.chmod(mode)

    with pytest.raises(ImageError, match="other users can write"):
        store.ensure(SPEC, silent)

    assert stat.S_IMODE(store.root.stat().st_mode) == mode


def test_equal_assets_are_one_image_under_two_names(store: ImageStore, image: Image) -> None:
    other = store.ensure(ImageSpec(arch="x86_64", include=("make",)), silent)

    assert other.digest == image.digest
    assert len(store.list()) == 1
    assert len(store.refs()) == 2


def test_a_new_build_of_changed_packages_moves_the_name(
    store: ImageStore, builder: Builder, image: Image
) -> None:
    builder.kernel = b"newer kernel"

    newer = store.build(SPEC, silent)

    assert newer.digest != image.digest
    assert store.get("default") == newer
    assert store.get(image.digest) == image


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(spec: ImageSpec, target: Path, progress: Progress) -> BuiltAssets:
        (target / "vmlinuz").write_bytes(b"half")
        raise ImageError("build", "the mirror is gone")

    store = ImageStore(tmp_path, builder=fail)

    with pytest.raises(ImageError, match="mirror is gone"):
        store.ensure(SPEC, silent)

    assert store.list() == []
    assert store.refs() == {}
    assert not (tmp_path / "staging").exists()


def test_a_program_that_outlives_its_killed_build_does_not_hold_up_the_next(
    store: ImageStore,
) -> None:
    """It goes on to write what an interrupted build left, as tar does for some seconds after its parent's SIGKILL."""
    left = store.root / "staging" / "build-old" / "tree"
    left.mkdir(parents=True)
    store.root.chmod(0o700)
    write = "for n in $(seq 600); do mkdir -p d$((n % 50)) && true > d$((n % 50))/$n; done 2>/dev/null; true"
    with subprocess.Popen(["sh", "-c", write], cwd=left) as straggler:
        wait_until(lambda: (left / "d40").exists())
        image = store.ensure(SPEC, silent)
        assert straggler.wait() == 0

    store.verify(image)
    assert not (store.root / "staging").exists()


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from taskvm.image.manifest import ImageSpec
from taskvm.image.store import ImageStore

def die(spec, target, progress):
    (target / "rootfs.ext4").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

ImageStore(Path(sys.argv[1]), builder=die).ensure(ImageSpec(), print)
"""


@pytest.mark.parametrize("step", ["the kernel's copy", "a digest", "the manifest", "the name"])
def test_a_disk_that_is_full_at_any_step_of_a_build_is_said_to_be(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """An error with the place and the remedy; nothing half made stays, and the next build succeeds."""
    full = OSError(errno.ENOSPC, "No space left on device", "/cache/some/file")

    def fail(*_: object, **__: object) -> None:
        raise full

    with monkeypatch.context() as patch:
        if step == "the kernel's copy":
            patch.setattr(store, "_builder", fail)
        elif step == "a digest":
            patch.setattr(store_module, "measure_asset", fail)
        elif step == "the manifest":
            patch.setattr(Path, "write_text", fail)
        else:
            patch.setattr(paths_module.os, "replace", fail)
        with pytest.raises(HostError, match="No space left") as caught:
            store.ensure(SPEC, silent)

    assert "Free disk space" in caught.value.next_step
    assert not (store.root / "staging").exists()
    assert store.ensure(SPEC, silent).kernel.read_bytes() == b"kernel"


def test_what_a_killed_build_left_is_removed_by_the_next(store: ImageStore) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_BUILD, str(store.root)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (store.root / "staging").glob("*/*")] == ["rootfs.ext4"]
    assert store.list() == []
    said: list[str] = []

    image = store.ensure(SPEC, said.append)

    assert image.rootfs.read_bytes() == b"root"
    assert not (store.root / "staging").exists()
    assert "removing what an interrupted build left behind" in said


KILLED_ANYWHERE = """
import itertools, os, signal, sys
from pathlib import Path
from taskvm.image.build import BuiltAssets
from taskvm.image.manifest import ImageSpec
from taskvm.image.store import ImageStore

SPEC = ImageSpec(arch="x86_64")
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
kernel = b"kernel"

def build(spec, target, progress):
    (target / "vmlinuz").write_bytes(kernel)
    (target / "modules").mkdir()
    (target / "modules" / "00-virtio.ko").write_bytes(b"module")
    (target / "rootfs.ext4").write_bytes(b"root")
    return BuiltAssets("6.1", {"libc6": "1"})

def die_before_change(number):
    left = number
    def hook(event, args):
        nonlocal left
        if event in CHANGES or (event == "open" and args[2] & WRITING):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

base, operation = Path(sys.argv[1]), sys.argv[2]
for number in itertools.count(1):
    store = ImageStore(base / str(number), builder=build)
    if operation != "build":
        store.ensure(SPEC, lambda line: None)
    child = os.fork()
    if child == 0:
        die_before_change(number)
        if operation == "update":
            kernel = b"newer kernel"
        if operation == "remove":
            store.remove("default" if "default" in store.refs() else next(iter(store.refs())), print)
        else:
            store.build(SPEC, lambda line: None)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print(number - 1)
"""


@pytest.mark.parametrize("operation", ["build", "build again", "update", "remove"])
def test_a_kill_before_any_change_of_the_store_leaves_it_whole(
    tmp_path: Path, builder: Builder, operation: str
) -> None:
    """What is listed is sound, what has a name is there, and the next build succeeds and leaves nothing over."""
    script = [sys.executable, "-c", KILLED_ANYWHERE, str(tmp_path), operation]
    kills = int(subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout)

    assert kills >= 5
    for number in range(1, kills + 1):
        store = ImageStore(tmp_path / str(number), builder=builder)
        for found in store.list():
            store.verify(found)
        assert set(store.refs().values()) <= set(store.digests()), number
        store.verify(store.ensure(SPEC, silent))
        store.verify(store.build(SPEC, silent))
        assert not (store.root / "staging").exists()


def test_a_second_build_waits_says_so_and_finds_the_first_ones_image(tmp_path: Path) -> None:
    waiting = threading.Event()
    quick = Builder()

    def slow(spec: ImageSpec, target: Path, progress: Progress) -> BuiltAssets:
        second.start()
        assert waiting.wait(timeout=PATIENCE_S)
        return quick(spec, target, progress)

    def hear(line: str) -> None:
        assert "another process is building" in line
        waiting.set()

    results: list[Image] = []
    never = Builder(b"must not run")
    other = ImageStore(tmp_path, builder=never)
    second = threading.Thread(target=lambda: results.append(other.ensure(SPEC, hear)))

    first = ImageStore(tmp_path, builder=slow).ensure(SPEC, silent)
    second.join(PATIENCE_S)

    assert results == [first]
    assert never.runs == 0


@pytest.mark.parametrize("name", ["../images", "", "a/b", ".hidden", "UPPER", "x" * 65])
def test_names_that_are_paths_are_refused(store: ImageStore, image: Image, name: str) -> None:
    with pytest.raises(UsageError):
        store.tag(image, name)
    with pytest.raises(UsageError):
        store.get(name)


def test_an_unknown_image_is_an_error_that_lists_the_known(store: ImageStore, image: Image) -> None:
    with pytest.raises(ImageError, match=r"names: default.*taskvm image build"):
        store.get("other")


def test_a_truncated_asset_is_noticed_at_once(store: ImageStore, image: Image) -> None:
    image.rootfs.chmod(0o600)
    os.truncate(image.rootfs, 1)

    with pytest.raises(ImageError, match=r"rootfs\.ext4.*rm -r"):
        store.get("default")


def test_a_changed_byte_is_found_by_verify(store: ImageStore, image: Image) -> None:
    store.verify(image)
    image.kernel.chmod(0o600)
    image.kernel.write_bytes(b"Kernel")

    with pytest.raises(ImageError, match="vmlinuz"):
        store.verify(image)


def test_an_unknown_field_in_a_manifest_is_refused(store: ImageStore, image: Image) -> None:
    manifest = image.path / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text(manifest.read_text().replace("{", '{"surprise": 1,', 1))

    with pytest.raises(ImageError, match="surprise"):
        store.get("default")


def test_a_damaged_image_is_built_anew_by_ensure(
    store: ImageStore, builder: Builder, image: Image
) -> None:
    image.kernel.unlink()
    said: list[str] = []

    repaired = store.ensure(SPEC, said.append)

    assert repaired.path == image.path
    assert repaired.kernel.read_bytes() == b"kernel"
    assert "vmlinuz is missing" in said[0]


def test_an_older_recipe_is_built_anew(
    store: ImageStore, builder: Builder, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "RECIPE", 99)

    newer = store.ensure(SPEC, silent)

    assert builder.runs == 2
    assert newer.manifest.recipe == 99


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TASKVM_CACHE": "/t", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/t"),
        ({"TASKVM_CACHE": "", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/taskvm"),
        ({"TASKVM_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/taskvm"),
        ({"TASKVM_CACHE": "", "XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/taskvm"),
    ],
)
def test_where_the_store_is(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert cache_path() == Path(expected)
