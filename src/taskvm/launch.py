"""From options to a running guest: the image, the template, the fork, its identity, and what it is equipped with."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from taskvm.checkpoints.carried import Carried
from taskvm.checkpoints.checkpointfile import Memory, Saved, check_memory
from taskvm.checkpoints.kept import keep_disk, kept_base
from taskvm.egress.boundsecret import BoundSecret, bind_secrets
from taskvm.errors import CheckpointError, HostError, ImageError
from taskvm.guest import Guest, Origin
from taskvm.limits import Limits
from taskvm.options import SandboxOptions
from taskvm.paths import cache_dir
from taskvm.room import room_for_one
from taskvm.turns import turn_to_start
from taskvm.vm.command import Disk
from taskvm.vm.machine import Machine
from taskvm.vm.rundir import RunDir, run_base
from taskvm.vm.template import GuestFiles, Template, inputs_for
from taskvm.vm.warm import Wanted, boot_cold, choose_accelerator, prepare
from taskvm.wanted import find_wanted
from taskvm.watch import check_free_space


async def launch(options: SandboxOptions) -> Guest:
    """Start a guest for `options`. Raises as Sandbox.create; nothing is left behind then."""
    bound = bind_secrets(options.policy, options.secrets, os.urandom)  # wrong ones start nothing
    check_free_space(cache_dir(), options.limits.free_disk_mib)
    if options.checkpoint is not None and options.checkpoint.memory is not None:
        return await _go_on(options, bound, options.checkpoint, options.checkpoint.memory)
    wanted = await _find(options)
    if not options.warm:
        async with turn_to_start():
            return await _equip(await _boot(wanted, options.limits), options, bound)
    template = await prepare(wanted)
    ready = await _take_ready(options, template)
    if ready is not None:
        return await _equip(ready, options, bound)
    async with turn_to_start():
        return await _equip(await fork(template, options.limits), options, bound)


async def _find(options: SandboxOptions) -> Wanted:
    saved = options.checkpoint
    try:
        wanted = await find_wanted(
            image=saved.facts.image if saved else options.image,
            accel=options.accel,
            cpus=options.cpus,
            memory_mib=options.memory_mib,
            progress=options.on_progress,
        )
    except ImageError as error:
        if saved is None:
            raise
        raise CheckpointError(
            f"use the checkpoint {saved.path}",
            f"it needs the image {saved.facts.image[:12]}, which is not here ({error.cause})",
            "Build the image that it was made with, or make a new checkpoint",
        ) from error
    if saved is None:
        return wanted
    if saved.facts.arch != wanted.qemu.arch:
        raise CheckpointError(
            f"use the checkpoint {saved.path}", f"it is of another processor: {saved.facts.arch}"
        )
    if saved.memory is not None:
        return wanted
    disk = await _keep(saved, options)
    return replace(wanted, guest=saved.above(wanted.guest, disk))


async def _keep(saved: Saved, options: SandboxOptions) -> Path:
    spare_bytes = options.limits.free_disk_mib << 20
    return await asyncio.to_thread(keep_disk, saved, spare_bytes=spare_bytes)


async def _take_ready(options: SandboxOptions, template: Template) -> Guest | None:
    """Return a guest of the pool, if there is one. They were started with the default limit of their disk."""
    if options.pool is None or options.limits.disk_limit_bytes != Limits().disk_limit_bytes:
        return None
    return await options.pool.take(template)


async def _equip(guest: Guest, options: SandboxOptions, bound: Sequence[BoundSecret]) -> Guest:
    async with _closed_on_failure(guest):
        await guest.equip(options, bound, resumed=options.warm)
    return guest


async def _go_on(
    options: SandboxOptions, bound: Sequence[BoundSecret], saved: Saved, memory: Memory
) -> Guest:
    """Start a guest that goes on where a memory checkpoint was made."""
    wanted = await _find(options)
    shape = wanted.shape(await choose_accelerator(wanted))
    memory.check(saved.path, inputs_for(wanted.qemu, shape, wanted.guest, wanted.user))
    disk = await _keep(saved, options)
    template = Template.at(saved.path, wanted.qemu, shape, wanted.guest, wanted.user)
    template = replace(template, disk=wanted.guest.disk(disk))
    # QEMU opens memory and state by their names; what was sealed may have gone since, and another have its name.
    check = partial(check_memory, saved.path, saved.facts, memory)
    return await resume(template, options, bound, memory.carried, check)


async def resume(
    template: Template,
    options: SandboxOptions,
    bound: Sequence[BoundSecret],
    carried: Carried,
    check: Callable[[], None] = lambda: None,
) -> Guest:
    """Start a guest that goes on where the one was saved whose memory `template` is.

    `check` raises unless that was what QEMU opened; it is called before the guest runs. Raises UsageError for mounts
    that are not the saved guest's.
    """
    carried.check_mounts(options.mounts)
    async with turn_to_start():
        guest = await fork(template, options.limits, carried, check)
        async with _closed_on_failure(guest):
            await guest.equip(options, carried.bind(bound), resumed=True)
        return guest


async def fork(
    template: Template,
    limits: Limits | None = None,
    carried: Carried | None = None,
    check: Callable[[], None] = lambda: None,
) -> Guest:
    """Start a guest from `template` and wake it. Raises UnavailableError, HostError or SandboxLostError."""
    with room_for_one():
        run_dir = _new_run_dir(template.guest, template.disk, template.path)
        try:
            template = replace(template, disk=_linked(template.disk, run_dir.path))
            machine = await template.fork(
                run_dir.path, disk_limit_bytes=(limits or Limits()).disk_limit_bytes
            )
            await _checked(machine, check)
        except OSError as error:  # what it starts from is being removed, or the original closed
            run_dir.remove()
            raise HostError(
                f"start a copy of {template.path}",
                f"{error.strerror or error}: {error.filename or 'a file of it'}",
                "Start again, or start from another",
            ) from error
        except BaseException:
            run_dir.remove()
            raise
        origin = Origin(template.qemu, template.guest, template.user)
        return await _wake(await Guest.take_over(machine, run_dir, origin, carried), resumed=True)


async def _checked(machine: Machine, check: Callable[[], None]) -> None:
    try:
        check()
    except BaseException:
        await machine.kill()
        raise


def _holders(disk: Disk) -> Iterator[Path]:
    """The templates, and the kept disks of checkpoints, that layers of `disk` belong to."""
    bases = (cache_dir() / "templates", kept_base())
    return (layer.parent for layer in disk.layers if layer.parent.parent in bases)


def _linked(disk: Disk, run_dir: Path) -> Disk:
    """Return `disk` with other sandboxes' layers under names of our own: theirs go when those sandboxes do."""
    layers = list(disk.layers)
    for number, layer in enumerate(layers):
        if layer.is_relative_to(run_base()):
            layers[number] = run_dir / f"below{len(layers) - number}.qcow2"
            layers[number].hardlink_to(layer)
    return replace(disk, layers=tuple(layers))


async def _boot(wanted: Wanted, limits: Limits) -> Guest:
    with room_for_one():
        run_dir = _new_run_dir(wanted.guest, wanted.guest.disk())
        try:
            machine = await boot_cold(
                wanted, run_dir.path, disk_limit_bytes=limits.disk_limit_bytes
            )
        except BaseException:
            run_dir.remove()
            raise
        origin = Origin(wanted.qemu, wanted.guest, wanted.user)
        return await _wake(await Guest.take_over(machine, run_dir, origin), resumed=False)


async def _wake(guest: Guest, *, resumed: bool) -> Guest:
    async with _closed_on_failure(guest):
        await guest.wake(resumed=resumed)
    return guest


@asynccontextmanager
async def _closed_on_failure(guest: Guest) -> AsyncIterator[None]:
    try:
        yield
    except BaseExceptionGroup as group:
        await guest.close()
        raise group.exceptions[0] from None  # the first failure; the others followed from it
    except BaseException:
        await guest.close()
        raise


def _new_run_dir(guest: GuestFiles, disk: Disk, *more: Path) -> RunDir:
    using = (guest.rootfs.parent, *more, *_holders(disk))
    return RunDir.create(f"sandbox-{secrets.token_hex(6)}", using=using)
