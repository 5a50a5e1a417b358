"""taskvm.cache and taskvm.vm.stale: the disk is freed, what is used stays, and a kill leaves a store that works."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from taskvm.cache import Cache
from taskvm.checkpoints.checkpointfile import Description, Facts, read_facts, write_facts
from taskvm.checkpoints.staging import store_dir
from taskvm.errors import HostError, ImageError
from taskvm.image.boot import boot_files
from taskvm.image.build import BuiltAssets
from taskvm.image.manifest import Image, ImageSpec
from taskvm.image.store import ImageStore, Progress
from taskvm.paths import hold
from taskvm.vm.native import guest_binary
from taskvm.vm.stale import remove_templates
from taskvm.vm.template import LAYOUT, Manifest, TemplateInputs, guest_key
from taskvm.wire.qcow2 import encode_empty

MIB = 1024 * 1024


def silent(_line: str) -> None:
    """Progress nobody reads."""


def build(spec: ImageSpec, target: Path, progress: Progress) -> BuiltAssets:
    """A tiny image that depends on its specification."""
    (target / "vmlinuz").write_bytes(b"kernel")
    (target / "modules").mkdir()
    (target / "modules" / "00-virtio.ko").write_bytes(b"module")
    (target / "rootfs.ext4").write_bytes(" ".join(spec.include).encode() + bytes(MIB))
    return BuiltAssets("6.1", {})


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "cache", builder=build)


@pytest.fixture
def cache(store: ImageStore) -> Cache:
    return Cache(store)


def unnamed(store: ImageStore, package: str) -> Image:
    """Build an image that no name stands for."""
    spec = ImageSpec(include=(package,))
    image = store.build(spec, silent)
    (store.root / "refs" / spec.ref_name).unlink()
    return image


def make_template(store: ImageStore, name: str, guest_digest: str, layout: int = LAYOUT) -> Path:
    texts = ("qemu_version", "qemu_path", "arch", "machine", "accelerator", "cpu_model")
    inputs = TemplateInputs(
        layout=layout,
        guest_digest=guest_digest,
        host_cpu="",
        kernel_arguments="",
        cpus=1,
        memory_mib=256,
        uid=0,
        gid=0,
        **dict.fromkeys(texts, "x"),
    )
    path = store.root / "templates" / name
    path.mkdir(parents=True)
    (path / "ram").write_bytes(bytes(MIB))
    (path / "manifest.json").write_bytes(msgspec.json.encode(Manifest(inputs=inputs, files={})))
    return path


def boot_digest(image: Image) -> str:
    return boot_files(image, guest_binary(image.manifest.arch)).digest


def test_an_image_goes_with_its_names_and_its_templates(store: ImageStore, cache: Cache) -> None:
    """What stays is another image and its template."""
    image, other = store.ensure(ImageSpec(), silent), unnamed(store, "other")
    store.tag(image, "mine")
    gone = make_template(store, "aa", boot_digest(image))
    stays = make_template(store, "bb", boot_digest(other))

    removed = list(cache.remove("mine", silent))

    assert [item.what for item in removed] == [
        f"image {image.digest[:12]} (default, mine)",
        "template aa",
    ]
    assert all(item.size_bytes >= MIB for item in removed)
    assert (store.refs(), store.digests()) == ({}, [other.digest])
    assert (gone.exists(), stays.exists(), (store.root / "staging").exists()) == (
        False,
        True,
        False,
    )


def test_two_may_prune_at_a_time(store: ImageStore, cache: Cache) -> None:
    """What one has listed, the other may have removed."""
    directory = store.root / "initramfs"
    directory.mkdir(parents=True)
    for name in ("aa.cpio", "bb.cpio"):
        (directory / name).touch()
        os.utime(directory / name, (0, 0))
    first = cache.prune(0, silent)

    removed = [next(first).what, *(each.what for each in Cache(store).prune(0, silent))]
    removed += [each.what for each in first]

    assert removed == ["initial file system aa.cpio", "initial file system bb.cpio"]


def test_an_image_that_is_removed_while_another_prunes_is_none(
    store: ImageStore, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there when images were listed."""
    image = store.ensure(ImageSpec(), silent)
    get = store.get

    def get_late(digest: str) -> Image:
        found = get(digest)
        store.remove(digest, silent)
        return found

    monkeypatch.setattr(store, "get", get_late)

    assert list(cache.prune(0, silent)) == []
    assert not image.path.exists()


def test_a_damaged_image_can_be_removed(store: ImageStore, cache: Cache) -> None:
    image = store.ensure(ImageSpec(), silent)
    image.kernel.unlink()

    list(cache.remove(image.digest[:12], silent))

    assert store.digests() == []


def test_an_unknown_image_is_an_error(cache: Cache) -> None:
    with pytest.raises(ImageError, match="does not hold it"):
        list(cache.remove("none", silent))


def test_what_is_held_stays(store: ImageStore, cache: Cache) -> None:
    """An image and a template in use survive rm and prune, and go once nobody uses them."""
    image = unnamed(store, "used")
    template = make_template(store, "aa", "of no image")
    holds = [hold(image.path), hold(template)]

    with pytest.raises(ImageError, match="a running sandbox uses it"):
        list(cache.remove(image.digest, silent))
    assert list(cache.prune(0, silent)) == []
    for descriptor in holds:
        os.close(descriptor)
    assert len(list(cache.prune(0, silent))) == 2


def save_disk(name: str, image: Image) -> Facts:
    """A checkpoint of the store above `image`."""
    path = store_dir() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_empty(64 * MIB))
    facts = {"arch": "x86_64", "cpus": 1, "memory_mib": 256, "qemu_version": "7", "created": "now"}
    write_facts(path, Description(image=image.digest, **facts))
    return read_facts(path)


def test_an_image_that_a_checkpoint_lies_above_stays(
    store: ImageStore, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a name too: built again it has another digest. The templates stay; all go after the checkpoint."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    image = unnamed(store, "used")
    disk = save_disk("base", image)
    kept = make_template(store, "aa", guest_key(boot_digest(image), disk.sha256))
    stale = make_template(store, "bb", guest_key(boot_digest(image), "0" * 64))
    (store_dir() / "damaged").write_bytes(b"of no use")

    pruned = [item.what for item in cache.prune(0, silent)]
    with pytest.raises(ImageError, match=r"lie above it: base;.*checkpoint rm base"):
        list(cache.remove(image.digest, silent))

    assert (pruned, store.digests()) == (["template bb"], [image.digest])
    assert (kept.exists(), stale.exists()) == (True, False)
    (store_dir() / "base").unlink()
    assert len(list(cache.prune(0, silent))) == 2


def test_a_killed_holder_holds_nothing(store: ImageStore, cache: Cache) -> None:
    image = store.ensure(ImageSpec(), silent)
    program = "import sys, time\nfrom pathlib import Path\nfrom taskvm.paths import hold\n"
    program += "hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, str(image.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.send_signal(signal.SIGKILL)
        holder.wait()

        list(cache.remove("default", silent))

    assert store.digests() == []


def test_what_is_gone_cannot_be_held(store: ImageStore) -> None:
    with pytest.raises(HostError, match="Start again"):
        hold(store.root / "images" / "none")


def test_prune_keeps_names_and_the_newest(store: ImageStore, cache: Cache) -> None:
    """Two of three images without a name go; the named one stays however old."""
    named = store.ensure(ImageSpec(), silent)
    images = [unnamed(store, name) for name in ("one", "two", "three")]
    for age, image in enumerate([named, *images]):
        os.utime(image.path, (1000 + age, 1000 + age))

    list(cache.prune(1, silent))

    assert set(store.digests()) == {named.digest, images[2].digest}


def test_prune_removes_what_is_stale_and_keeps_what_is_current(
    store: ImageStore, cache: Cache
) -> None:
    """Templates of no image, of an old layout, broken or half made go; an initramfs goes when it is old and unused."""
    image = store.ensure(ImageSpec(), silent)
    current = make_template(store, "aa", boot_digest(image))
    make_template(store, "bb", "of no image")
    make_template(store, "cc", boot_digest(image), layout=LAYOUT - 1)
    (store.root / "templates" / "dd").mkdir()
    (store.root / "templates" / ".ee").mkdir()
    recent, old = (store.root / "initramfs" / name for name in ("recent.cpio", "old.cpio"))
    for path in (recent, old):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)

    list(cache.prune(0, silent))

    assert [path for path in (store.root / "templates").iterdir() if path.is_dir()] == [current]
    assert recent.exists()
    assert not old.exists()
    assert boot_files(image, guest_binary(image.manifest.arch)).initrd.exists()


def test_a_template_being_built_is_left_to_its_builder(store: ImageStore) -> None:
    """The builder holds the lock of its template, in another process."""
    base = store.root / "templates"
    (base / ".aa").mkdir(parents=True)
    program = "import fcntl, sys, time\nlock = open(sys.argv[1], 'w'); fcntl.flock(lock, 2)\n"
    program += "print('locked', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, str(base / "aa.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()

        assert list(remove_templates(base, lambda digest: True)) == []
        builder.kill()

    assert [item.what for item in remove_templates(base, lambda digest: True)] == ["template aa"]


# Kills.

# Kills itself when the interpreter raises the audit event number argv[2] that touches the store: renames, removals,
# openings, directories. So each system call of the operation is a moment at which it ends.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_cache import build, silent
from taskvm.cache import Cache
from taskvm.image.manifest import ImageSpec
from taskvm.image.store import ImageStore
root, left = sys.argv[1], int(sys.argv[2])

def count(event, arguments):
    global left
    if event.startswith(("os.", "open", "shutil.")) and any(root in str(each) for each in arguments):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

store = ImageStore(Path(root), builder=build)
sys.addaudithook(count)
if sys.argv[3] == "build":
    store.build(ImageSpec(include=("new",)), silent)
else:
    list(Cache(store).remove("default", silent))
print(left)
"""


@pytest.mark.timeout(900)  # a hundred interpreters
@pytest.mark.parametrize("operation", ["build", "remove"])
def test_a_kill_at_any_moment_leaves_a_store_that_works(
    store: ImageStore, cache: Cache, operation: str
) -> None:
    """At every third touch of the store: what is listed is sound, every name leads to an image, and both work again."""
    moments = 0
    for moment in range(0, 300, 3):
        store.ensure(ImageSpec(), silent)
        arguments = [str(store.root), str(moment), operation, str(Path(__file__).parent)]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
        for image in store.list():
            store.verify(image)
        assert set(store.refs().values()) <= set(store.digests())
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        moments += 1

    store.verify(store.build(ImageSpec(include=("new",)), silent))
    list(cache.prune(0, silent))
    assert moments > 5
    assert done.returncode == 0
    assert not (store.root / "staging").exists()
