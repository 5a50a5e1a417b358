"""Warm templates: a machine booted once, saved at rest, and forked copy-on-write for every later start.

A template is a directory named by the digest of everything its state depends on (`TemplateInputs`):

    ram            the guest's memory; mapped copy-on-write by every fork, never opened writable again
    state          QEMU's device state
    disk.qcow2     the disk as the booted guest left it, above the image's root file system
    manifest.json  the inputs, and size, inode and times of the files above

Rule 1: nothing of a user's runs before a template is saved, and nothing unique is in it.
Rule 2: it appears in one rename, complete and fsynced; builders of the same template wait for each other.
Rule 3: it is checked before each use; one that does not match its manifest is rebuilt.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from taskvm.errors import HostError, SandboxLostError, UnavailableError
from taskvm.identity import GuestUser
from taskvm.paths import (
    cache_dir,
    lock_if_free,
    newest_first,
    private_dir,
    remedy_for,
    replace_file,
    seized,
)
from taskvm.vm.boot import quiesce_ports, reach_ready
from taskvm.vm.command import Boot, Disk, MachineShape
from taskvm.vm.disk import create_layer
from taskvm.vm.machine import DISK_LIMIT_BYTES, Machine, MachineFiles
from taskvm.vm.qemu import Qemu

# Part of every key: raise it when qemu_command's devices change or a template holds something else.
LAYOUT = 6
FILES = ("ram", "state", "disk.qcow2")
# Of the most recently used. Each new agent, image, size or QEMU makes another; a running one keeps its open files.
KEPT_TEMPLATES = 8
# What the programs of the warm-up left to the guest's kernel (cgroups to free, pages to count) is done within a second
# or two, by timers that nobody can wait for. Else every fork does it: 2000 of the 12000 blocks that TCG translates.
SETTLE_S = 2.0
# With less free a build that failed is taken to have failed for it: pages and tables come in clusters of 64 KiB.
FULL_DISK_BYTES = 1024 * 1024
# How late the end of another's build of the same template may be noticed.
LOCK_INTERVAL_S = 0.1

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestFiles:
    """What a guest boots from: kernel, initial file system, root disk, and the digest of all.

    The root disk is raw ext4 with, above it, the qcow2 `layers` of the disk checkpoint whose digest is `checkpoint`.
    `digest` is that of the image's own three.
    """

    boot: Boot
    rootfs: Path
    digest: str
    layers: tuple[Path, ...] = ()
    checkpoint: str = ""

    @property
    def key(self) -> str:
        """A digest of all that it boots from."""
        return guest_key(self.digest, self.checkpoint)

    def disk(self, *above: Path) -> Disk:
        """Return this disk with the layers `above`, the topmost first."""
        return Disk(layers=(*above, *self.layers), base=self.rootfs)


def guest_key(digest: str, checkpoint: str) -> str:
    """Return the key of a guest that boots from an image's files `digest`, and a checkpoint's disk if there is one."""
    return hashlib.sha256(f"{digest} {checkpoint}".encode()).hexdigest() if checkpoint else digest


class TemplateInputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a saved state depends on. Its digest names the template."""

    layout: int
    guest_digest: str
    qemu_version: str
    qemu_path: str
    arch: str
    machine: str
    accelerator: str
    cpu_model: str
    host_cpu: str
    kernel_arguments: str
    cpus: int
    memory_mib: int
    uid: int
    gid: int

    @property
    def digest(self) -> str:
        """32 hexadecimal digits."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:32]


class FileMark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What identifies a file's content as long as nobody has root: any write moves mtime and ctime."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    inputs: TemplateInputs
    files: dict[str, FileMark]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A saved machine, ready to be forked."""

    path: Path
    qemu: Qemu
    shape: MachineShape
    guest: GuestFiles
    user: GuestUser
    disk: Disk

    @classmethod
    def at(
        cls, path: Path, qemu: Qemu, shape: MachineShape, guest: GuestFiles, user: GuestUser
    ) -> Template:
        """Return the template whose files are in the directory `path`."""
        disk = guest.disk(path / "disk.qcow2")
        return cls(path=path, qemu=qemu, shape=shape, guest=guest, user=user, disk=disk)

    async def fork(self, run_dir: Path, *, disk_limit_bytes: int = DISK_LIMIT_BYTES) -> Machine:
        """Start a copy of this machine with its disk in `run_dir`. It is loaded and paused.

        Its ports are at rest (QUIESCED): send an identity, then RESUME. Raises UnavailableError or SandboxLostError.
        """
        disk = run_dir / "disk.qcow2"
        create_layer(disk, self.disk)
        files = MachineFiles(
            boot=self.guest.boot,
            disk=Disk(layers=(disk, *self.disk.layers), base=self.disk.base),
            memory=self.path / "ram",
            state=self.path / "state",
            disk_limit_bytes=disk_limit_bytes,
        )
        machine = await Machine.start(self.qemu, self.shape, files)
        try:
            await machine.load_state()
        except BaseException:
            await machine.kill()
            raise
        return machine


def inputs_for(
    qemu: Qemu, shape: MachineShape, guest: GuestFiles, user: GuestUser
) -> TemplateInputs:
    """Return what the template for these depends on."""
    return TemplateInputs(
        layout=LAYOUT,
        guest_digest=guest.key,
        qemu_version=qemu.version,
        qemu_path=str(qemu.path),
        arch=shape.arch,
        machine=shape.machine,
        accelerator=shape.accelerator,
        cpu_model=shape.cpu_model,
        host_cpu=_host_cpu() if shape.accelerator == "kvm" else "",
        kernel_arguments=shape.kernel_arguments,
        cpus=shape.cpus,
        memory_mib=shape.memory_mib,
        uid=user.uid,
        gid=user.gid,
    )


async def ensure_template(
    qemu: Qemu,
    shape: MachineShape,
    guest: GuestFiles,
    user: GuestUser,
    progress: Progress,
    *,
    build_timeout_s: float | None = None,
) -> Template:
    """Return the template for these inputs, building it when it is missing or stale (seconds; `progress` is told).

    Raises TimeoutError when building it takes longer than `build_timeout_s`; another's build does not count.
    """
    inputs = inputs_for(qemu, shape, guest, user)
    base = private_dir(cache_dir() / "templates")
    template = Template.at(base / inputs.digest, qemu, shape, guest, user)
    with contextlib.suppress(FileNotFoundError):
        os.utime(template.path)  # before the look at it: what is about to be used is not old
        if _is_intact(template.path, inputs):
            return template
    async with _locked(base / f"{inputs.digest}.lock", progress):
        if not _is_intact(template.path, inputs):
            progress(f"booting a {shape.memory_mib} MiB guest once, to start from its memory later")
            async with asyncio.timeout(build_timeout_s):
                await _build(template, inputs, base)
            _remove_old(base)
    return template


# Building.


async def _build(template: Template, inputs: TemplateInputs, base: Path) -> None:
    staging = base / f".{inputs.digest}"
    shutil.rmtree(staging, ignore_errors=True)  # an interrupted build's; we hold the lock
    private_dir(staging)
    try:
        await _boot_and_save(template, staging)
        marks = {name: _seal(staging / name) for name in FILES}
        replace_file(
            staging / "manifest.json", msgspec.json.encode(Manifest(inputs=inputs, files=marks))
        )
        shutil.rmtree(template.path, ignore_errors=True)
        staging.rename(template.path)
    except OSError as error:
        raise _no_room(template, error.strerror or str(error)) from error
    except (SandboxLostError, UnavailableError) as error:
        # QEMU gets SIGBUS when its memory file finds no room, and says nothing.
        if shutil.disk_usage(base).free >= FULL_DISK_BYTES:
            raise
        raise _no_room(template, f"the disk is full ({error.cause})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _no_room(template: Template, cause: str) -> HostError:
    return HostError(
        f"save the template {template.path}",
        cause,
        f"A template needs {template.shape.memory_mib} MiB of disk: free some",
    )


async def _boot_and_save(template: Template, staging: Path) -> None:
    guest = template.guest
    disk = staging / "disk.qcow2"
    create_layer(disk, guest.disk())
    memory = staging / "ram"
    reserve_memory(memory, template.shape.memory_mib)
    files = MachineFiles(boot=guest.boot, disk=guest.disk(disk), memory=memory, share_memory=True)
    machine = await Machine.start(template.qemu, template.shape, files)
    try:
        ports = await reach_ready(machine, template.user)
        try:
            await quiesce_ports(ports)
            await asyncio.sleep(SETTLE_S)
            await machine.execute("stop")
            await machine.save_state(staging / "state")
            await machine.execute("quit")
            await asyncio.wait([machine.exited], timeout=10)
        finally:
            ports.close()
    finally:
        await machine.kill()


def _remove_old(base: Path) -> None:
    for path in _old(base):
        with building(base, path.name) as ours, contextlib.suppress(FileNotFoundError):
            if ours:  # else it is being built anew, or removed by another
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a template unless somebody has begun to use it. We hold the builders' lock of it.

    By a rename first: nobody finds it half there, and its last change, which removal moves to now, counts for no other.
    """
    trash = path.with_name(f".{path.name}")
    with seized(path) as free:
        if not free or path not in _old(path.parent):
            return
        shutil.rmtree(trash, ignore_errors=True)  # a killed builder's
        path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def building(base: Path, digest: str) -> AbstractContextManager[bool]:
    """Take the builders' lock of one template for a moment; say whether it was free."""
    lock = base / f"{digest}.lock"
    return lock_if_free(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _old(base: Path) -> list[Path]:
    return newest_first(path for path in base.glob("*/") if path.name[0] != ".")[KEPT_TEMPLATES:]


def reserve_memory(memory: Path, memory_mib: int) -> None:
    """Make the memory file, refusing early when the disk cannot hold it: a full disk would be SIGBUS in QEMU."""
    needed = memory_mib * 1024 * 1024
    free = shutil.disk_usage(memory.parent).free
    if free < needed * 5 // 4:
        raise HostError(
            f"make the memory file {memory}",
            f"{needed >> 20} MiB are needed and {free >> 20} MiB are free",
            "Free disk space, or set TASKVM_CACHE to a directory on a larger disk",
        )
    descriptor = os.open(memory, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.truncate(descriptor, needed)
    os.close(descriptor)


def _seal(path: Path) -> FileMark:
    """Make the file read-only, write it through to the disk, and return its mark."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o400)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return mark_file(path)


# Checking.


def _is_intact(path: Path, inputs: TemplateInputs) -> bool:
    try:
        manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)
        return manifest.inputs == inputs and all(
            manifest.files.get(name) == mark_file(path / name) for name in FILES
        )
    except (OSError, msgspec.MsgspecError):
        return False


def mark_file(file: Path | int) -> FileMark:
    """Return what tells a later write to a file: what is at a path, or open."""
    status = os.fstat(file) if isinstance(file, int) else file.stat(follow_symlinks=False)
    return FileMark(
        size=status.st_size,
        inode=status.st_ino,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
    )


def _host_cpu() -> str:
    """The processor's identity: with KVM the guest sees the host's features, and a state fits no other processor."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    wanted = ("model name", "flags", "microcode", "Features", "CPU part")
    text = "\n".join(line for line in lines if line.startswith(wanted)) + os.uname().release
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@asynccontextmanager
async def _locked(path: Path, progress: Progress) -> AsyncIterator[None]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            f"make the lock {path}", error.strerror or str(error), remedy_for(error)
        ) from error
    try:
        if not _try_lock(descriptor):
            progress("waiting for another process that is preparing the same template")
        # Not flock in a thread: one that waits cannot be cancelled, and a program's end would wait for it.
        while not _try_lock(descriptor):  # noqa: ASYNC110 - another process has it
            await asyncio.sleep(LOCK_INTERVAL_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
