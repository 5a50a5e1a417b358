"""From options to a running guest: the image, the template, the fork, its identity, and what it is equipped with."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from taskvm.guest import Guest
from taskvm.injection import bind_secrets
from taskvm.limits import Limits
from taskvm.options import SandboxOptions
from taskvm.paths import cache_dir
from taskvm.vm.rundir import RunDir
from taskvm.vm.template import GuestFiles, Template
from taskvm.vm.warm import Wanted, boot_cold, prepare
from taskvm.wanted import find_wanted
from taskvm.watch import check_free_space


async def launch(options: SandboxOptions) -> Guest:
    """Start a guest for `options`. Raises as Sandbox.create; nothing is left behind then."""
    bound = bind_secrets(options.policy, options.secrets, os.urandom)  # wrong ones start nothing
    check_free_space(cache_dir(), options.limits.free_disk_mib)
    wanted = await find_wanted(
        image=options.image,
        accel=options.accel,
        cpus=options.cpus,
        memory_mib=options.memory_mib,
        progress=options.on_progress,
    )
    guest = await _start(options, wanted)
    async with _closed_on_failure(guest):
        await guest.equip(options, bound, resumed=options.warm)
    return guest


async def _start(options: SandboxOptions, wanted: Wanted) -> Guest:
    if not options.warm:
        return await _boot(wanted, options.limits)
    template = await prepare(wanted)
    limits = options.limits
    # A pool's guests were started with the default limit of their disk.
    if options.pool is not None and limits.disk_limit_mib == Limits().disk_limit_mib:
        taken = await options.pool.take(template)
        if taken is not None:
            return taken
    return await fork(template, limits)


async def fork(template: Template, limits: Limits | None = None) -> Guest:
    """Start a guest from `template` and wake it. Raises UnavailableError, HostError or SandboxLostError."""
    run_dir = _new_run_dir(template.guest, template.path)
    try:
        machine = await template.fork(
            run_dir.path, disk_limit_bytes=(limits or Limits()).disk_limit_bytes
        )
    except BaseException:
        run_dir.remove()
        raise
    return await _wake(await Guest.take_over(machine, run_dir, template.user), resumed=True)


async def _boot(wanted: Wanted, limits: Limits) -> Guest:
    run_dir = _new_run_dir(wanted.guest)
    try:
        machine = await boot_cold(wanted, run_dir.path, disk_limit_bytes=limits.disk_limit_bytes)
    except BaseException:
        run_dir.remove()
        raise
    return await _wake(await Guest.take_over(machine, run_dir, wanted.user), resumed=False)


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


def _new_run_dir(guest: GuestFiles, *more: Path) -> RunDir:
    using = (guest.rootfs.parent, *more)
    return RunDir.create(f"sandbox-{secrets.token_hex(6)}", using=using)
