"""A running sandbox becomes a checkpoint; it runs on.

The machine stops for some milliseconds while its disk is cut (vm/snapshot.py). What was cut never changes again, so it
is flattened into one file while the guest's programs run; then its layers are merged, and nothing of it remains.
A checkpoint appears under its name in one step, complete and written through to the disk.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from taskvm.background import finished
from taskvm.checkpoints.carried import Carried
from taskvm.checkpoints.checkpointfile import (
    Saved,
    copy_disk,
    describe,
    read_checkpoint,
    verify_checkpoint,
    write_facts,
    write_memory,
)
from taskvm.checkpoints.staging import publish, read_published, staged
from taskvm.errors import CheckpointError
from taskvm.guest import Guest
from taskvm.limits import spare_bytes
from taskvm.vm.command import Disk
from taskvm.vm.disk import check_room, flatten
from taskvm.vm.snapshot import Cut, save_disk, save_machine
from taskvm.vm.template import inputs_for, mark_file


async def save(guest: Guest, path: Path, *, memory: bool) -> Saved:
    """Save `guest` as the new checkpoint `path`.

    Raises CheckpointError, HostError on a full disk, SandboxStateError, SandboxLostError.
    """
    with staged(path) as staging:
        async with guest.kept_awake(f"save the sandbox {guest.id}"), guest.layers.merged():
            if memory:
                cut, carried = await cut_machine(guest, staging)
            else:
                cut, carried = await save_disk(guest.machine, guest.layers, guest.at_rest), None
            await _flatten(guest, cut.disk, staging / "disk.qcow2")
        # A thread that is left behind would write where nothing is any more.
        await finished(asyncio.to_thread(_describe, guest, staging, carried))
        await finished(asyncio.to_thread(publish, staging, path, memory=memory))
    return await asyncio.to_thread(read_published, path)


async def _flatten(guest: Guest, disk: Disk, path: Path) -> None:
    stop = threading.Event()
    spare = guest.spare_bytes(path.parent)
    work = asyncio.to_thread(flatten, disk, path, spare_bytes=spare, stop=stop.is_set)
    await finished(work, hurry=stop.set)


async def cut_machine(guest: Guest, directory: Path) -> tuple[Cut, Carried]:
    """Save the memory of `guest` in `directory` and cut its disk; return also what the host knows of it then.

    Raises HostError without room for it, UsageError for a mount that cannot be taken up, SandboxLostError.
    """
    memory_bytes = guest.machine.shape.memory_mib << 20
    check_room(directory / "ram", memory_bytes, guest.spare_bytes(directory))
    known: list[Carried] = []

    @asynccontextmanager
    async def at_rest() -> AsyncIterator[None]:
        async with guest.at_rest():
            known.append(guest.carry())
            yield

    cut = await save_machine(guest.machine, guest.layers, at_rest, directory)
    return cut, known[-1]


def _describe(guest: Guest, staging: Path, carried: Carried | None) -> None:
    shape, files = guest.machine.shape, guest.origin.files
    image = files.rootfs.parent.name  # an image's directory is named by its digest
    description = describe(image, shape, guest.origin.qemu.version)
    write_facts(staging / "disk.qcow2", description)
    if carried is not None:
        plain = replace(files, layers=(), checkpoint="")
        write_memory(staging, inputs_for(guest.origin.qemu, shape, plain, guest.user), carried)


def import_disk(source: Path, path: Path) -> Saved:
    """Make the new checkpoint `path` of a disk checkpoint from anywhere. Raises CheckpointError, HostError.

    Its clusters are copied, and its tables written anew: nothing of the file's structure is taken over.
    """
    saved = read_checkpoint(source)
    if saved.memory is not None:
        raise CheckpointError(
            f"import {source}", "it holds memory, which fits one host", f"Import {saved.disk}"
        )
    with staged(path) as staging:
        mark = verify_checkpoint(saved)
        flatten(Disk(layers=(source,)), staging / "disk.qcow2", spare_bytes=spare_bytes(staging))
        if mark_file(source.resolve()) != mark:
            raise CheckpointError(f"import {source}", "it was changed meanwhile", "Start again")
        write_facts(staging / "disk.qcow2", saved.facts)
        publish(staging, path, memory=False)
    return read_published(path)


def export_disk(saved: Saved, path: Path) -> None:
    """Copy a disk checkpoint to the new file `path`. Raises CheckpointError."""
    if saved.memory is not None:
        raise CheckpointError(
            f"export the checkpoint {saved.path}",
            "its memory fits this host, QEMU and agent alone, and holds keys",
            f"Export its disk: taskvm checkpoint import {saved.disk} NAME, and that",
        )
    with staged(path) as staging:
        mark = verify_checkpoint(saved)
        check_room(staging / "disk.qcow2", mark.size, spare_bytes(staging))
        copy_disk(saved.path, staging / "disk.qcow2")
        publish(staging, path, memory=False)
