"""Which machine is meant: an image of the store, the agent and QEMU of its architecture, an accelerator, a size."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from pathlib import Path

from taskvm.image.boot import boot_files
from taskvm.image.manifest import Image, ImageSpec
from taskvm.image.store import ImageStore
from taskvm.interruption import in_thread
from taskvm.vm.command import Boot
from taskvm.vm.native import guest_binary
from taskvm.vm.qemu import find_qemu, host_arch
from taskvm.vm.template import GuestFiles, Progress
from taskvm.vm.warm import AcceleratorChoice, Wanted


async def find_wanted(
    *,
    image: str | None,
    accel: AcceleratorChoice,
    cpus: int,
    memory_mib: int,
    progress: Progress,
) -> Wanted:
    """Return the machine for these options, building the default image when it is missing (minutes, once).

    Raises UnavailableError without QEMU, ImageError for an image that is not there or cannot be built, UsageError.
    """
    if image is None:
        await asyncio.to_thread(find_qemu, host_arch())  # before minutes of work for nothing
    found = await in_thread(_find_image, image, progress)
    qemu = await asyncio.to_thread(find_qemu, found.manifest.arch)
    guest = await asyncio.to_thread(_guest_files, found)
    return Wanted(
        qemu=qemu, guest=guest, accel=accel, cpus=cpus, memory_mib=memory_mib, progress=progress
    )


def _find_image(name: str | None, progress: Progress) -> Image:
    store = ImageStore()
    return store.ensure(ImageSpec(arch=host_arch()), progress) if name is None else store.get(name)


def _guest_files(image: Image) -> GuestFiles:
    agent = guest_binary(image.manifest.arch)
    files = _boot_files(image.path, image, agent, agent.stat().st_mtime_ns)
    if not (files.boot.initrd.exists() and files.boot.head.exists()):  # pruned since
        _boot_files.cache_clear()
        files = _boot_files(image.path, image, agent, agent.stat().st_mtime_ns)
    return files


@lru_cache(maxsize=16)  # reading and hashing 4 MB would cost 15 ms of every start
def _boot_files(path: Path, image: Image, agent: Path, changed_ns: int) -> GuestFiles:
    files = boot_files(image, agent)
    boot = Boot(kernel=files.kernel, initrd=files.initrd, head=files.head)
    return GuestFiles(boot=boot, rootfs=files.rootfs, digest=files.digest)
