"""taskvm.image.boot: the initramfs, byte for byte, and the store of those made before."""

import hashlib
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.errors import ImageError
from taskvm.image import boot
from taskvm.image.boot import CpioEntry, _write_once, boot_files, write_cpio
from taskvm.image.manifest import (
    MANIFEST_FORMAT,
    RECIPE,
    Asset,
    Image,
    ImageSpec,
    Manifest,
)


def test_an_image_that_has_just_been_removed_is_an_image_error(image: Image, agent: Path) -> None:
    """`taskvm image rm` at the moment of a start."""
    (image.path / "modules/00-virtio_ring.ko").unlink()

    with pytest.raises(ImageError, match="No such file or directory"):
        boot_files(image, agent)


def read_cpio(archive: bytes) -> list[CpioEntry]:
    """Read a newc archive as the kernel does (init/initramfs.c), without the trailer."""
    entries: list[CpioEntry] = []
    position = 0
    while True:
        assert archive[position : position + 6] == b"070701"
        header = archive[position + 6 : position + 110]
        fields = [int(header[start : start + 8], 16) for start in range(0, 104, 8)]
        name = archive[position + 110 : position + 109 + fields[11]].decode()
        start = (position + 110 + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            return entries
        data = archive[start : start + fields[6]]
        entries.append(CpioEntry(name, fields[1], data, os.makedev(fields[9], fields[10])))
        position = (start + fields[6] + 3) & ~3


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """An image of two modules in a store."""
    path = tmp_path / "images" / "d1"
    (path / "modules").mkdir(parents=True)
    names = ("modules/00-virtio_ring.ko", "modules/01-virtio.ko")
    for name in names:
        (path / name).write_bytes(name.encode())
    (path / "vmlinuz").write_bytes(bytes(range(256)) * 2048)
    manifest = Manifest(
        format=MANIFEST_FORMAT,
        recipe=RECIPE,
        digest="d1",
        arch="x86_64",
        created="2026-01-01T00:00:00+00:00",
        spec=ImageSpec(arch="x86_64"),
        kernel_release="6.1",
        packages={},
        assets={name: Asset(sha256="", size_bytes=1) for name in (*names, "vmlinuz")},
    )
    return Image(path, manifest)


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    path.write_bytes(b"\x7fELF agent")
    return path


def test_the_initramfs_holds_the_agent_the_modules_mount_points_and_a_console(
    image: Image, agent: Path
) -> None:
    entries = {
        entry.name: entry for entry in read_cpio(boot_files(image, agent).initrd.read_bytes())
    }

    assert entries["init"] == CpioEntry("init", stat.S_IFREG | 0o755, b"\x7fELF agent")
    assert entries["dev/console"].mode == stat.S_IFCHR | 0o600
    assert entries["dev/console"].device == os.makedev(5, 1)
    assert entries["modules/01-virtio.ko"].data == b"modules/01-virtio.ko"
    assert [name for name, entry in entries.items() if stat.S_ISDIR(entry.mode)] == [
        "dev",
        "modules",
        "newroot",
        "proc",
        "sys",
    ]


def test_the_same_agent_gives_the_same_file_and_another_agent_another(
    image: Image, agent: Path
) -> None:
    first = boot_files(image, agent)
    again = boot_files(image, agent)
    agent.write_bytes(b"\x7fELF newer agent")
    newer = boot_files(image, agent)

    assert again == first
    assert newer.initrd != first.initrd
    assert newer.digest != first.digest
    assert newer.rootfs == first.rootfs


def test_an_initramfs_is_named_by_its_contents(image: Image, agent: Path) -> None:
    files = boot_files(image, agent)

    assert files.initrd.stem == hashlib.sha256(files.initrd.read_bytes()).hexdigest()


def test_processes_that_make_the_same_file_at_once_share_the_first(
    image: Image, agent: Path, tmp_path: Path
) -> None:
    """A QEMU that one has started reads that file and no other: it is never replaced."""
    archive = boot_files(image, agent).initrd
    first = archive.stat().st_ino

    _write_once(archive, b"the same")

    assert archive.stat().st_ino == first


def test_the_head_is_the_kernels_beginning(image: Image, agent: Path) -> None:
    """QEMU keeps what it reads in memory, and looks at no more than this."""
    head = boot_files(image, agent).head.read_bytes()

    assert head == image.kernel.read_bytes()[: len(head)]
    assert len(head) == 256 * 1024


def test_a_packed_kernel_has_no_head(image: Image, agent: Path) -> None:
    image.kernel.write_bytes(b"\x1f\x8b" + bytes(1000))

    assert boot_files(image, agent).head == image.kernel


def test_only_the_latest_are_kept(
    image: Image, agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot, "_KEPT_INITRAMFS", 2)

    for version in range(5):
        agent.write_bytes(b"agent %d" % version)
        last = boot_files(image, agent)

    kept = list(last.initrd.parent.glob("*.cpio"))
    assert len(kept) == 2
    assert last.initrd in kept


def test_the_one_just_made_is_kept_whatever_the_clock_says(
    image: Image, agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot, "_KEPT_INITRAMFS", 1)
    earlier = boot_files(image, agent).initrd
    os.utime(earlier, (2**33, 2**33))
    agent.write_bytes(b"a later agent")

    last = boot_files(image, agent).initrd

    assert list(last.parent.glob("*.cpio")) == [last]


def test_a_missing_agent_is_an_error_that_says_how_to_build_it(
    image: Image, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match="scripts/build-native"):
        boot_files(image, tmp_path / "none")


def test_a_header_is_what_the_kernels_documentation_says() -> None:
    archive = write_cpio([CpioEntry("a", stat.S_IFREG | 0o644, b"xyz")])

    assert archive[:110] == (
        b"070701"
        b"00000001"  # inode
        b"000081A4"  # mode
        b"00000000"
        b"00000000"
        b"00000001"  # links
        b"00000000"  # time
        b"00000003"  # size
        b"00000000"
        b"00000000"
        b"00000000"
        b"00000000"
        b"00000002"  # length of the name with its NUL
        b"00000000"
    )
    assert archive[110:120] == b"a\0xyz\0" + b"0707"
    assert len(archive) % 512 == 0


names = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1).filter(
    lambda name: name != "TRAILER!!!"
)


@given(st.lists(st.tuples(names, st.binary()), unique_by=lambda item: item[0]))
def test_whatever_is_written_is_read_back_sorted(files: list[tuple[str, bytes]]) -> None:
    entries = [CpioEntry(name, stat.S_IFREG | 0o644, data) for name, data in files]

    archive = write_cpio(entries)

    assert read_cpio(archive) == sorted(entries, key=lambda entry: entry.name)
    assert archive == write_cpio(reversed(entries))
