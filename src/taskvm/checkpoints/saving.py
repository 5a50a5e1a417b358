"""A running sandbox becomes a checkpoint; it runs on.

The machine stops for some milliseconds while its disk is cut (vm/snapshot.py). What was cut never changes again, so it
is flattened into one file while the guest's programs run; then its layers are merged, and nothing of it remains.
A checkpoint appears under its name in one step, complete and written through to the disk.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

from taskvm.checkpoints.carried import Carried
from taskvm.checkpoints.checkpointfile import (
    Saved,
    describe,
    note_verified,
    read_checkpoint,
    verify_checkpoint,
    write_facts,
    write_memory,
)
from taskvm.errors import CheckpointError
from taskvm.guest import Guest
from taskvm.paths import sync_directory
from taskvm.vm.command import Disk
from taskvm.vm.disk import flatten
from taskvm.vm.snapshot import Cut, save_disk, save_machine
from taskvm.vm.template import inputs_for, mark_file


async def save(guest: Guest, path: Path, *, memory: bool) -> Saved:
    """Save `guest` as the new checkpoint `path`. Raises CheckpointError, SandboxStateError, SandboxLostError."""
    with _staging(path) as staging:
        async with guest.kept_awake():
            if memory:
                cut, carried = await cut_machine(guest, staging)
            else:
                cut, carried = await save_disk(guest.machine, guest.layers, guest.at_rest), None
            try:
                await asyncio.to_thread(flatten, cut.disk, staging / "disk.qcow2")
            finally:
                await guest.layers.merge()
        await asyncio.to_thread(_describe, guest, staging, carried)
        return await asyncio.to_thread(_publish, staging, path, memory=memory)


async def cut_machine(guest: Guest, directory: Path) -> tuple[Cut, Carried]:
    """Save the memory of `guest` in `directory` and cut its disk; return also what the host knows of it then."""
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
    with _staging(path) as staging:
        verify_checkpoint(saved)
        flatten(Disk(layers=(source,)), staging / "disk.qcow2")
        write_facts(staging / "disk.qcow2", saved.facts)
        return _publish(staging, path, memory=False)


def export_disk(saved: Saved, path: Path) -> None:
    """Copy a disk checkpoint to the new file `path`. Raises CheckpointError."""
    if saved.memory is not None:
        raise CheckpointError(
            f"export the checkpoint {saved.path}",
            "its memory fits this host, QEMU and agent alone, and holds keys",
            f"Export its disk: taskvm checkpoint import {saved.disk} NAME, and that",
        )
    with _staging(path) as staging:
        verify_checkpoint(saved)
        shutil.copyfile(saved.path, staging / "disk.qcow2")
        _publish(staging, path, memory=False)


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A private directory beside `path`, which is a checkpoint in one step, or nothing."""
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"make the checkpoint {path}", "it is there already", "Remove it")
    staging = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        staging.mkdir(mode=0o700)
    except OSError as error:
        raise CheckpointError(
            f"make the checkpoint {path}",
            error.strerror or str(error),
            "Choose a directory that is there and may be written",
        ) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, path: Path, *, memory: bool) -> Saved:
    try:
        if memory:
            staging.rename(path)  # fails unless what is there is an empty directory
        else:
            path.hardlink_to(staging / "disk.qcow2")  # fails when something is there
        sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"make the checkpoint {path}", error.strerror or str(error), "Choose another name"
        ) from error
    saved = read_checkpoint(path)
    note_verified(saved, mark_file(saved.disk))
    return saved
