"""Attacks with checkpoint files: one from elsewhere names no file of the host, and none is changed unnoticed."""

import json
import os
import shutil
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from tests.conftest import GUEST

from taskvm import Checkpoint, CheckpointError, CheckpointStore, HostDir, HostError, Sandbox, sync
from taskvm.checkpoints.checkpointfile import (
    MAGIC,
    Description,
    Saved,
    read_checkpoint,
    write_facts,
)
from taskvm.checkpoints.kept import keep_disk
from taskvm.errors import UsageError
from taskvm.paths import state_dir
from taskvm.vm.template import TemplateInputs, inputs_for

pytestmark = pytest.mark.vm

CLUSTER = 65536
CANARY = b"canary-of-the-host-5d1e"


@pytest.fixture(scope="module")
def saved_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest disk checkpoint."""
    path = tmp_path_factory.mktemp("saved") / "disk.qcow2"
    with sync.Sandbox.create(**GUEST) as vm:
        vm.exec("echo honest > /var/tmp/honest", check=True)
        vm.checkpoint(path)
    return path


@pytest.fixture
async def memory(tmp_path: Path) -> AsyncIterator[Path]:
    """A memory checkpoint of this user."""
    async with Sandbox.create(**GUEST) as vm:
        yield (await vm.checkpoint(tmp_path / "memory", memory=True)).path


def forged(source: Path, target: Path, change: Callable[[bytearray], None]) -> Path:
    """A copy whose disk was changed, with facts and a digest that are right for what it became."""
    saved = read_checkpoint(source)
    content = bytearray(source.read_bytes()[: saved.facts.disk_bytes])
    change(content)
    target.write_bytes(content)
    known = {name: getattr(saved.facts, name) for name in Description.__struct_fields__}
    write_facts(target, Description(**known))
    return target


def name_backing(content: bytearray) -> None:
    """The file beneath is one of the host's."""
    struct.pack_into(">QI", content, 8, 1024, len(b"/etc/passwd"))
    content[1024:1035] = b"/etc/passwd"


def name_data_file(content: bytearray) -> None:
    """The data lies in another file: the feature bit, and the extension with its name."""
    struct.pack_into(">Q", content, 72, 4)
    struct.pack_into(">II", content, 112, 0x44415441, 16)
    content[120:136] = b"/etc/passwd\0\0\0\0\0"


def name_data_file_quietly(content: bytearray) -> None:
    struct.pack_into(">II", content, 112, 0x44415441, 16)
    content[120:136] = b"/etc/passwd\0\0\0\0\0"


def point_outside(content: bytearray) -> None:
    """The first table leads behind the end of the file."""
    first = struct.unpack_from(">Q", content, 40)[0]
    struct.pack_into(">Q", content, first, 1 << 63 | 1 << 45)


@pytest.mark.parametrize("change", [name_backing, name_data_file, name_data_file_quietly])
def test_a_disk_that_names_a_file_of_the_host_is_refused(
    saved_disk: Path, tmp_path: Path, change: Callable[[bytearray], None]
) -> None:
    """Before any tool opens it, whatever its digest says."""
    path = forged(saved_disk, tmp_path / "forged.qcow2", change)

    with pytest.raises(CheckpointError, match="names a file|incompatible|extension"):
        Checkpoint.load(path)
    with pytest.raises(CheckpointError, match="names a file|incompatible|extension"):
        CheckpointStore().import_(path, "forged")


async def test_a_disk_whose_tables_lie_is_refused(saved_disk: Path, tmp_path: Path) -> None:
    path = forged(saved_disk, tmp_path / "forged.qcow2", point_outside)

    with pytest.raises(HostError, match="outside of the file"):
        CheckpointStore().import_(path, "forged")
    with pytest.raises(HostError, match="outside of the file"):
        await Checkpoint.load(path).resume()


async def test_a_disk_that_was_changed_is_not_started(saved_disk: Path, tmp_path: Path) -> None:
    """One byte, on the way or by somebody: nothing starts, and nothing is imported."""
    path = tmp_path / "changed.qcow2"
    content = bytearray(saved_disk.read_bytes())
    content[read_checkpoint(saved_disk).facts.disk_bytes - 100] ^= 1
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="its content is not what it was"):
        await Checkpoint.load(path).resume()
    with pytest.raises(CheckpointError, match="its content is not what it was"):
        CheckpointStore().import_(path, "changed")


async def test_a_disk_that_is_changed_after_it_was_believed_is_not_believed_again(
    saved_disk: Path, tmp_path: Path
) -> None:
    """The verdict holds for the file as it was then."""
    path = tmp_path / "later.qcow2"
    shutil.copyfile(saved_disk, path)
    async with Checkpoint.load(path).resume() as vm:
        assert (await vm.exec("cat /var/tmp/honest")).stdout == "honest\n"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(read_checkpoint(path).facts.disk_bytes - 100)
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(CheckpointError, match="its content is not what it was"):
        await Checkpoint.load(path).resume()


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"", "does not end like"),
        (struct.pack(">I8s", 0, MAGIC), "0 bytes"),
        (struct.pack(">I8s", 0xFFFFFFFF, MAGIC), "4294967295 bytes"),
        (b"{}" + struct.pack(">I8s", 2, MAGIC), "missing required field"),
        (b"[" * 9000 + struct.pack(">I8s", 9000, MAGIC), "Expected `object`"),
    ],
)
def test_facts_that_lie_are_refused(
    saved_disk: Path, tmp_path: Path, tail: bytes, reason: str
) -> None:
    path = tmp_path / "lie.qcow2"
    path.write_bytes(saved_disk.read_bytes()[: read_checkpoint(saved_disk).facts.disk_bytes] + tail)

    with pytest.raises(CheckpointError, match=reason):
        Checkpoint.load(path)


def test_facts_name_no_path(saved_disk: Path, tmp_path: Path) -> None:
    """The image is a digest, never where to look for it."""
    content = saved_disk.read_bytes()
    image = read_checkpoint(saved_disk).facts.image.encode()
    path = tmp_path / "path.qcow2"
    path.write_bytes(content.replace(image, b"../" * 21 + b"x"))

    with pytest.raises(CheckpointError, match=r"matching regex|image"):
        Checkpoint.load(path)


def test_what_is_no_file_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            Checkpoint.load(path)


def test_an_import_is_written_anew_and_an_export_is_one_file(
    saved_disk: Path, tmp_path: Path
) -> None:
    """What is between clusters and tables does not come along; what the guest had does."""

    def hide(content: bytearray) -> None:
        content += CANARY.ljust(CLUSTER, b"\0")  # a cluster that no table names

    path = forged(saved_disk, tmp_path / "padded.qcow2", hide)
    store = CheckpointStore()
    imported = store.import_(path, "imported")
    out = store.export("imported", tmp_path / "out.qcow2")
    store.remove("imported")
    store.import_(out, "again")

    assert out.read_bytes() == saved_disk.read_bytes()
    assert Checkpoint.load(out).image == imported.image
    with pytest.raises(CheckpointError, match="it is there already"):
        store.export("again", out)
    store.remove("again")


async def test_memory_without_the_users_seal_is_not_loaded(memory: Path, tmp_path: Path) -> None:
    """Its state is a program for QEMU: changed, sealed by another, copied or swapped, it is refused."""
    sealed = (memory / "memory.json").read_bytes()

    (memory / "memory.json").write_bytes(sealed.replace(b'"cpus":1', b'"cpus":2'))
    with pytest.raises(CheckpointError, match="does not have this user's seal"):
        Checkpoint.load(memory)
    (memory / "memory.json").write_bytes(sealed)
    assert Checkpoint.load(memory).memory
    key = (state_dir() / "seal.key").read_bytes()
    (state_dir() / "seal.key").write_bytes(os.urandom(32))
    with pytest.raises(CheckpointError, match="does not have this user's seal"):
        Checkpoint.load(memory)
    (state_dir() / "seal.key").write_bytes(key)
    shutil.copytree(memory, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="was changed, or is a copy"):
        Checkpoint.load(tmp_path / "copy")
    (memory / "ram").chmod(0o600)
    with (memory / "ram").open("r+b") as file:
        file.write(b"\x90")
    with pytest.raises(CheckpointError, match="ram was changed"):
        Checkpoint.load(memory)


async def test_memory_that_takes_the_name_of_another_while_it_starts_is_not_run(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint is removed and another saved under the name: that would go on with the first one's disk."""
    async with Sandbox.create(**GUEST) as vm:
        other = (await vm.checkpoint(tmp_path / "other", memory=True)).path

    def swapped(saved: Saved, **options: int) -> Path:
        disk = keep_disk(saved, **options)
        memory.rename(tmp_path / "removed")
        other.rename(memory)
        return disk

    monkeypatch.setattr("taskvm.launch.keep_disk", swapped)

    with pytest.raises(CheckpointError, match="its file ram was changed"):
        await Checkpoint.load(memory).resume()


async def test_memory_of_another_machine_says_what_differs(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an update of QEMU or of the agent; its disk can still be used."""
    monkeypatch.setattr("taskvm.vm.template.LAYOUT", 999_003)

    with pytest.raises(CheckpointError, match=r"layout was \d+ and is 999003.*disk.qcow2"):
        await Checkpoint.load(memory).resume()

    assert not Checkpoint.load(memory / "disk.qcow2").memory


@pytest.mark.parametrize("name", ["qemu_version", "host_cpu", "arch", "cpu_model"])
async def test_memory_of_another_qemu_or_processor_is_not_loaded(
    memory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each is named: a state that does not fit is a program that does something else."""

    def other(*arguments: object) -> TemplateInputs:
        return msgspec.structs.replace(inputs_for(*arguments), **{name: "another"})  # type: ignore[arg-type]

    monkeypatch.setattr("taskvm.launch.inputs_for", other)

    with pytest.raises(CheckpointError, match=f"{name} was .* and is another"):
        await Checkpoint.load(memory).resume()


def test_a_disk_of_another_processor_is_not_started(saved_disk: Path, tmp_path: Path) -> None:
    other = with_facts(saved_disk, tmp_path / "other.qcow2", arch="s390x")

    with pytest.raises(CheckpointError, match="it is of another processor: s390x"):
        sync.Checkpoint.load(other).resume()


def with_facts(source: Path, target: Path, **changes: object) -> Path:
    """A copy that says something else of itself."""
    facts, content = read_checkpoint(source).facts, source.read_bytes()
    text = json.dumps(json.loads(content[facts.disk_bytes : -12]) | changes).encode()
    target.write_bytes(content[: facts.disk_bytes] + text + struct.pack(">I8s", len(text), MAGIC))
    return target


async def test_no_value_and_no_key_is_where_others_read(memory: Path) -> None:
    """The authority's key is in a file that only the user reads; the guest's own disk has none of it."""
    assert oct((memory / "memory.json").stat().st_mode & 0o777) == "0o600"
    assert b"PRIVATE KEY" in (memory / "memory.json").read_bytes()
    assert all(
        b"PRIVATE KEY-----\nMIG" not in (memory / name).read_bytes()
        for name in ("state", "disk.qcow2")
    )
    assert oct((state_dir() / "seal.key").stat().st_mode & 0o777) == "0o600"
    assert "BEGIN" not in repr(read_checkpoint(memory))


async def test_what_a_guest_can_write_is_nothing_to_start_from(
    saved_disk: Path, workspace: Path
) -> None:
    """An agent that forges the checkpoint of the next task."""
    shutil.copyfile(saved_disk, workspace / "mine.qcow2")

    with pytest.raises(UsageError, match="the guest may write to"):
        Checkpoint.load(workspace / "mine.qcow2").resume(mounts={"/workspace": HostDir(workspace)})


def test_a_checkpoint_for_another_image_says_which(saved_disk: Path, tmp_path: Path) -> None:
    other = with_facts(saved_disk, tmp_path / "other.qcow2", image="0" * 64)

    with pytest.raises(CheckpointError, match="it needs the image 000000000000"):
        sync.Checkpoint.load(other).resume()
