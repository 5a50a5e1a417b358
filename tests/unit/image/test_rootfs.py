"""taskvm.image.rootfs: an ext4 image made by the real mke2fs, checked by the real e2fsck."""

import io
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from taskvm.errors import ImageError
from taskvm.image.rootfs import build_rootfs
from taskvm.image.tools import run_tool

STATUS = b"""\
Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9
Maintainer: t
Description: t
"""


def add(tar: tarfile.TarFile, name: str, data: bytes | None, mode: int, uid: int = 0) -> None:
    """Add a file, or a directory where `data` is None."""
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
    entry.mode, entry.uid, entry.size = mode, uid, len(data or b"")
    tar.addfile(entry, io.BytesIO(data or b""))


@pytest.fixture
def root_tar(tmp_path: Path) -> Path:
    path = tmp_path / "root.tar"
    with tarfile.open(path, "w") as tar:
        for directory in ("", "usr", "usr/bin", "var", "var/lib", "var/lib/dpkg", "workspace"):
            add(tar, f"./{directory}", None, 0o755)
        add(tar, "./var/lib/dpkg/status", STATUS, 0o644)
        add(tar, "./usr/bin/sudo", b"suid", 0o4755)
        add(tar, "./workspace/mine", b"user's", 0o600, uid=1000)
    return path


def build(root_tar: Path, name: str) -> Path:
    """Build an image in a directory of its own."""
    directory = root_tar.parent / name
    directory.mkdir()
    image = directory / "rootfs.ext4"
    assert build_rootfs(root_tar, directory, image, 512) == {"libc6": "2.36-9"}
    return image


def test_two_builds_at_different_times_are_the_same_bytes(root_tar: Path) -> None:
    first = build(root_tar, "first")
    time.sleep(1.1)  # ext4 counts whole seconds where it would show
    second = build(root_tar, "second")

    subprocess.run(["cmp", first, second], check=True)


def test_the_file_system_is_sound_and_sparse(root_tar: Path) -> None:
    image = build(root_tar, "image")

    run_tool("check", ["e2fsck", "-fn", str(image)])
    assert image.stat().st_size >= 512 * 1024 * 1024
    assert image.stat().st_blocks * 512 < 16 * 1024 * 1024


def test_no_table_is_left_to_be_initialised_in_the_guest(root_tar: Path) -> None:
    image = build(root_tar, "image")

    groups = run_tool("list", ["dumpe2fs", str(image)]).split("\nGroup ")[1:]

    assert groups
    assert all("ITABLE_ZEROED" in group for group in groups)


@pytest.mark.parametrize(
    ("path", "mode", "owner"),
    [
        ("/usr/bin/sudo", "04755", "User:     0"),
        ("/workspace/mine", "0600", "User:  1000"),
        ("/dev", "0755", "User:     0"),
    ],
)
def test_modes_and_owners_survive(root_tar: Path, path: str, mode: str, owner: str) -> None:
    image = build(root_tar, "image")

    facts = run_tool("look", ["debugfs", "-R", f"stat {path}", str(image)])

    assert f"Mode:  {mode}" in facts
    assert owner in facts


def test_a_tree_without_debian_in_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "./var/lib/dpkg/status", b"", 0o644)

    with pytest.raises(ImageError, match="libc6"):
        build_rootfs(path, tmp_path, tmp_path / "image", 512)
