"""Attacks on a read-only mount, and what no mount serves: by a hostile kernel, and by the root of a real guest."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from tests.conftest import GUEST
from tests.support.hostile_kernel import O_CREAT, O_TRUNC, O_WRONLY, ROOT, HostileKernel
from tests.support.second_actor import fingerprint

from taskvm import HostDir, Sandbox
from taskvm.wire.fuse import WRITE_CACHE, Opcode


@pytest.fixture
def share(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    (path / "directory").mkdir(parents=True)
    (path / "file").write_bytes(b"workspace")
    (path / "directory" / "inner").write_bytes(b"inner")
    return path


@pytest.fixture
def reader(share: Path) -> Iterator[HostileKernel]:
    hostile = HostileKernel(HostDir(share, mode="ro"))
    yield hostile
    hostile.close()


def every_change(file: int) -> list[tuple[int, int, bytes]]:
    """One request of each kind that changes something."""
    written = struct.pack("<QQIIQII", 0, 0, 1, 0, 0, O_WRONLY, 0) + b"x"
    mapped = struct.pack("<QQIIQII", 0, 0, 1, WRITE_CACHE, 0, O_WRONLY, 0) + b"x"
    copied = struct.pack("<QQQQQQQ", 0, 0, file, 0, 4, 4, 0)
    truncated = struct.pack("<IIQQQqqqIIIIIIII", 8, *[0] * 15)
    chmodded = struct.pack("<IIQQQqqqIIIIIIII", 1, *[0] * 10, 0o777, *[0] * 4)
    touched = struct.pack("<IIQQQqqqIIIIIIII", 48, *[0] * 15)
    return [
        (Opcode.WRITE, file, written),
        (Opcode.WRITE, file, mapped),
        (Opcode.COPY_FILE_RANGE, file, copied),
        (Opcode.SETATTR, file, truncated),
        (Opcode.SETATTR, file, chmodded),
        (Opcode.SETATTR, file, touched),
        (Opcode.FALLOCATE, file, struct.pack("<QQQII", 0, 0, 100, 0, 0)),
        (Opcode.SETXATTR, file, struct.pack("<II", 1, 0) + b"user.a\0x"),
        (Opcode.REMOVEXATTR, file, b"user.there\0"),
        (Opcode.CREATE, ROOT, struct.pack("<IIII", O_CREAT, 0o644, 0, 0) + b"new\0"),
        (Opcode.CREATE, ROOT, struct.pack("<IIII", O_CREAT | O_TRUNC, 0o644, 0, 0) + b"file\0"),
        (Opcode.MKNOD, ROOT, struct.pack("<IIII", stat.S_IFREG, 0, 0, 0) + b"new\0"),
        (Opcode.MKNOD, ROOT, struct.pack("<IIII", stat.S_IFIFO, 0, 0, 0) + b"new\0"),
        (Opcode.MKDIR, ROOT, struct.pack("<II", 0o755, 0) + b"new\0"),
        (Opcode.SYMLINK, ROOT, b"new\0target\0"),
        (Opcode.LINK, ROOT, struct.pack("<Q", file) + b"new\0"),
        (Opcode.UNLINK, ROOT, b"file\0"),
        (Opcode.RMDIR, ROOT, b"directory\0"),
        (Opcode.RENAME, ROOT, struct.pack("<Q", ROOT) + b"file\0new\0"),
        (Opcode.RENAME2, ROOT, struct.pack("<QII", ROOT, 2, 0) + b"file\0directory\0"),
    ]


CHANGES = len(every_change(0))


@pytest.mark.parametrize("number", range(CHANGES))
def test_a_read_only_mount_refuses_each_change(
    reader: HostileKernel, share: Path, number: int
) -> None:
    os.setxattr(share / "file", "user.there", b"1")
    file = reader.lookup(ROOT, b"file")
    before = (share / "file").stat()
    opcode, node, body = every_change(file)[number]

    assert reader.ask(opcode, node, body) == (errno.EROFS, b"")

    assert (share / "file").stat() == before
    assert sorted(entry.name for entry in share.iterdir()) == ["directory", "file"]
    assert os.listxattr(share / "file") == ["user.there"]


IOCTL, POLL, TMPFILE, SETLK = 39, 40, 51, 32
FICLONE, FICLONERANGE, FS_IOC_SETFLAGS = 0x40049409, 0x4020940D, 0x40086602


def asked_of(command: int) -> bytes:
    """An ioctl with the greatest argument that one has."""
    return struct.pack("<QIIQII", 0, 0, command, 0, 32, 32) + struct.pack("<qQQQ", 3, 0, 0, 0)


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.OPEN, struct.pack("<II", O_WRONLY | O_TRUNC, 0)),
        (Opcode.OPEN, struct.pack("<II", O_WRONLY | O_TRUNC, 1)),  # FUSE_OPEN_KILL_SUIDGID
        (IOCTL, asked_of(FICLONE)),
        (IOCTL, asked_of(FICLONERANGE)),
        (IOCTL, asked_of(FS_IOC_SETFLAGS)),
        (TMPFILE, struct.pack("<IIII", O_CREAT, 0o4755, 0, 0) + b"x\0"),
        (SETLK, bytes(48)),
        (POLL, bytes(24)),
        (4095, bytes(100)),
        (2**32 - 1, b""),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["direct", "ro"])
def test_what_no_mount_serves_does_nothing(
    share: Path, mode: Literal["direct", "ro"], opcode: int, body: bytes
) -> None:
    """Opening with O_TRUNC among it: the guest's kernel opens by itself, and truncates by SETATTR."""
    kernel = HostileKernel(HostDir(share, mode=mode))
    file, before = kernel.lookup(ROOT, b"file"), (share / "file").stat()

    assert kernel.ask(opcode, file, body) == (errno.ENOSYS, b"")
    assert kernel.ask(opcode, ROOT, body) == (errno.ENOSYS, b"")

    assert (share / "file").stat() == before
    assert sorted(entry.name for entry in share.iterdir()) == ["directory", "file"]
    kernel.close()


def test_the_read_only_provider_refuses_by_itself_too(share: Path) -> None:
    provider = HostDir(share, mode="ro")
    file = provider.lookup(ROOT, b"file").node

    for attempt in (
        lambda: provider.write(file, 0, memoryview(b"x"), append=False),
        lambda: provider.create(ROOT, b"new", 0o644, 0),
        lambda: provider.create(ROOT, b"file", 0o644, O_TRUNC),
        lambda: provider.mkdir(ROOT, b"new", 0o755),
        lambda: provider.mknod(ROOT, b"new", 0o644),
        lambda: provider.symlink(ROOT, b"new", b"target"),
        lambda: provider.link(file, ROOT, b"new"),
        lambda: provider.unlink(ROOT, b"file"),
        lambda: provider.rmdir(ROOT, b"directory"),
        lambda: provider.rename(ROOT, b"file", ROOT, b"new", 0),
        lambda: provider.allocate(file, 0, 10, 0),
        lambda: provider.copy_range(file, 0, file, 4, 4),
        lambda: provider.setxattr(file, b"user.a", b"", 0),
        lambda: provider.removexattr(file, b"user.a"),
    ):
        with pytest.raises(OSError, match="EROFS"):
            attempt()
    provider.close()


# By programs of a real guest, whose kernel may well have taken the mount for a writable one.
ATTACK = """
import ctypes, fcntl, mmap, os, subprocess
subprocess.run(["mount", "-o", "remount,rw", "/workspace"])
subprocess.run(["mount", "-o", "remount,rw,bind", "/workspace"])
os.chdir("/workspace")
open("/tmp/source", "wb").write(b"guest" * 1000)
libc = ctypes.CDLL(None, use_errno=True)


def changed(flags, act):
    fd = os.open("file", flags)
    try:
        act(fd)
    finally:
        os.close(fd)


def mapped(fd):
    with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as view:
        view[:5] = b"guest"
        view.flush()


def cloned(fd):
    with open("/tmp/source", "rb") as source:
        fcntl.ioctl(fd, 0x40049409, source.fileno())


def copied(fd):
    with open("/tmp/source", "rb") as source:
        os.copy_file_range(source.fileno(), fd, 100)


def punched(fd):
    if libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)):
        raise OSError(ctypes.get_errno(), "refused")


granted = []
for name, act in {
    "truncated by open": lambda: os.close(os.open("file", os.O_WRONLY | os.O_TRUNC)),
    "written": lambda: changed(os.O_RDWR, lambda fd: os.write(fd, b"guest")),
    "appended": lambda: changed(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"guest")),
    "mapped": lambda: changed(os.O_RDWR, mapped),
    "truncated": lambda: os.truncate("file", 0),
    "allocated": lambda: changed(os.O_RDWR, lambda fd: os.posix_fallocate(fd, 0, 1 << 20)),
    "punched": lambda: changed(os.O_RDWR, punched),
    "copied": lambda: changed(os.O_RDWR, copied),
    "cloned": lambda: changed(os.O_RDWR, cloned),
    "flagged": lambda: changed(os.O_RDONLY, lambda fd: fcntl.ioctl(fd, 0x40086602, bytes(8))),
    "chmod": lambda: os.chmod("file", 0o4777),
    "chown": lambda: os.chown("file", 0, 0),
    "times": lambda: os.utime("file", (1, 1)),
    "attribute": lambda: os.setxattr("file", "user.guest", b"1"),
    "created": lambda: os.close(os.open("new", os.O_CREAT | os.O_WRONLY)),
    "nameless": lambda: os.close(os.open(".", os.O_TMPFILE | os.O_RDWR)),
    "fifo": lambda: os.mkfifo("fifo"),
    "device": lambda: os.mknod("device", 0o20666, os.makedev(1, 3)),
    "directory": lambda: os.mkdir("made"),
    "removed": lambda: os.unlink("file"),
    "emptied": lambda: os.rmdir("empty"),
    "moved": lambda: os.rename("file", "directory/inner"),
    "moved over": lambda: os.rename("/tmp/source", "file"),
    "linked": lambda: os.link("file", "directory/linked"),
    "symlinked": lambda: os.symlink("/etc/passwd", "link"),
}.items():
    try:
        act()
        granted.append(name)
    except OSError:
        pass
os.sync()
print("granted:", *granted)
"""


@pytest.mark.vm
async def test_no_program_changes_a_read_only_mount(share: Path) -> None:
    """As root of the guest, after a remount; most of it is granted where the mount is not read-only."""
    (share / "empty").mkdir()
    before = fingerprint(share)

    async with Sandbox.create(mounts={"/workspace": HostDir(share, mode="ro")}, **GUEST) as vm:
        done = await vm.exec(["python3", "-c", ATTACK], user="root", check=True)

    assert done.stdout == "granted:\n"
    assert fingerprint(share) == before
