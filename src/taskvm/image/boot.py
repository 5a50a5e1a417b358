"""What QEMU boots: the image's kernel, its disk, and an initramfs of the image's modules and the guest agent.

The agent changes more often than the image, so the initramfs is not part of the image: it is put together when
first asked for (a few milliseconds) and kept under the digest of what is in it. It is a newc cpio archive, not
compressed, since unpacking costs an emulated processor more than reading 3 MB (kernel: Documentation/driver-api/
early-userspace/buffer-format.rst).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from taskvm.errors import ImageError
from taskvm.image.manifest import Image
from taskvm.paths import newest_first, replace_file

_KEPT_INITRAMFS = (
    16  # of the most recently used; a developer makes one with each build of the agent
)
_CONSOLE = os.makedev(5, 1)
# The setup part of an x86 kernel is at most 255 sectors and one (kernel: Documentation/x86/boot.rst, setup_sects); QEMU
# reads all of it. Of an arm64 image it reads the header, 64 bytes.
_HEAD_BYTES = 256 * 1024
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class BootFiles:
    """The files for QEMU's -kernel, -initrd and root disk. `digest` names all three.

    `head` is the kernel's beginning, for a machine whose kernel is in its memory already.
    """

    kernel: Path
    initrd: Path
    head: Path
    rootfs: Path
    digest: str


@dataclass(frozen=True, slots=True)
class CpioEntry:
    """One entry of an archive; `mode` holds the file's type too."""

    name: str
    mode: int
    data: bytes = b""
    device: int = 0


def boot_files(image: Image, agent_path: Path) -> BootFiles:
    """Return the files to boot `image` with the agent.

    Raises ImageError when there is no agent at `agent_path`, or no image any more; HostError.
    """
    try:
        agent = agent_path.read_bytes()
    except OSError as error:
        raise ImageError(
            f"read the guest agent {agent_path}",
            str(error.strerror),
            "Build it: scripts/build-native",
        ) from error
    try:
        return _put_together(image, agent)
    except OSError as error:
        raise ImageError(
            f"use the guest image {image.path}",
            f"{error.strerror or error}: {error.filename}",
            "If it was removed a moment ago, start again: the default image is built anew",
        ) from error


def _put_together(image: Image, agent: bytes) -> BootFiles:
    archive = write_cpio(initramfs_entries(image, agent))
    digest = hashlib.sha256(archive).hexdigest()
    directory = image.path.parent.parent / "initramfs"
    initrd = directory / f"{digest}.cpio"
    try:
        os.utime(initrd)  # so that the latest used are kept
    except FileNotFoundError:
        directory.mkdir(mode=0o700, exist_ok=True)
        _write_once(initrd, archive)
        _remove_old(directory, initrd)
    whole = hashlib.sha256(f"{image.digest} {digest}".encode()).hexdigest()
    head = _kernel_head(image, directory / f"{image.digest}.head")
    return BootFiles(image.kernel, initrd, head, image.rootfs, whole)


def _kernel_head(image: Image, head: Path) -> Path:
    """Return what QEMU's loader looks at: the rest would be 13 MB of each fork's memory, with the initramfs."""
    with image.kernel.open("rb") as kernel:
        beginning = kernel.read(_HEAD_BYTES)
    if beginning.startswith(_GZIP_MAGIC):  # QEMU unpacks it before it looks
        return image.kernel
    if not head.exists():
        _write_once(head, beginning)
    return head


def initramfs_entries(image: Image, agent: bytes) -> list[CpioEntry]:
    """Return what the initramfs holds: the agent as /init, the modules, mount points and a console."""
    directories = ("dev", "modules", "newroot", "proc", "sys")
    return [
        CpioEntry("init", stat.S_IFREG | 0o755, agent),
        # The kernel opens it for /init before anything can mount devtmpfs.
        CpioEntry("dev/console", stat.S_IFCHR | 0o600, device=_CONSOLE),
        *(CpioEntry(name, stat.S_IFDIR | 0o755) for name in directories),
        *(
            CpioEntry(f"modules/{path.name}", stat.S_IFREG | 0o644, path.read_bytes())
            for path in image.modules
        ),
    ]


def write_cpio(entries: Iterable[CpioEntry]) -> bytes:
    """Return a newc archive: sorted, owned by root, every time 0, so equal entries give equal bytes."""
    out = bytearray()
    # Sorted names put a directory before what is in it.
    for number, entry in enumerate(sorted(entries, key=lambda each: each.name), start=1):
        _append(out, number, entry)
    _append(out, 0, CpioEntry("TRAILER!!!", 0))
    out += bytes(-len(out) % 512)
    return bytes(out)


def _append(out: bytearray, number: int, entry: CpioEntry) -> None:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        number,
        entry.mode,
        0,  # uid
        0,  # gid
        links,
        0,  # mtime
        len(entry.data),
        0,  # device of the file
        0,
        os.major(entry.device),
        os.minor(entry.device),
        len(name),
        0,  # checksum, unused by newc
    )
    out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
    out += bytes(-len(out) % 4)
    out += entry.data
    out += bytes(-len(out) % 4)


# Keeping them...


def _write_once(path: Path, content: bytes) -> None:
    """Write `path` unless another process has by now: a QEMU that it starts is bound to that file (Landlock)."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        if not path.exists():
            replace_file(path, content)
    finally:
        os.close(directory)


def _remove_old(directory: Path, made: Path) -> None:
    # Times do not tell which it is: others may bear the same, or a later one, of a clock that was set back.
    others = (path for path in directory.glob("*.cpio") if path != made)
    for path in newest_first(others)[_KEPT_INITRAMFS - 1 :]:
        # Another process may have removed it first; a QEMU that runs has read it already.
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
