"""Copies of a running sandbox: its memory saved once, mapped copy-on-write by each copy; its disk one more layer.

The memory is a file in the sandbox's own directory, which goes as soon as the copies have mapped it. The layer that
was cut stays as long as one of them has a name for it (launch.py), so the original cannot merge it: it gets one deeper.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from taskvm.checkpoints.carried import Carried
from taskvm.checkpoints.saving import cut_machine
from taskvm.egress.boundsecret import bind_secrets
from taskvm.errors import HostError, SandboxStateError, TaskvmError, UsageError
from taskvm.fs.memory import Memory
from taskvm.fs.provider import Provider
from taskvm.fs.router import Router
from taskvm.fs.shadow import Shadow
from taskvm.fs.wrapper import Wrapper
from taskvm.guest import Guest, close_all
from taskvm.launch import resume
from taskvm.options import SandboxOptions
from taskvm.vm.template import Template

MAX_FORKS = 256


async def fork_guest(guest: Guest, children: Sequence[SandboxOptions]) -> list[Guest | TaskvmError]:
    """Start a copy of `guest` for each of `children`; a failed one is its error.

    Raises SandboxStateError, UsageError, HostError or SandboxLostError when nothing could be copied.
    """
    operation = f"fork the sandbox {guest.id}"
    if not 1 <= len(children) <= MAX_FORKS:
        raise UsageError(f"{operation} {len(children)} times", f"it must be 1 to {MAX_FORKS}")
    _refuse_shared_writing(guest, children, operation)
    with _directory(guest.directory) as directory, ExitStack() as lent:
        async with guest.kept_awake(operation):
            cut, carried = await cut_machine(guest, directory)
            lent.enter_context(guest.layers.lent())
        origin = guest.origin
        template = Template(
            path=directory,
            qemu=origin.qemu,
            shape=guest.machine.shape,
            guest=origin.files,
            user=origin.user,
            disk=cut.disk,
        )
        return await _start_all(template, carried, children)


def _refuse_shared_writing(
    guest: Guest, children: Sequence[SandboxOptions], operation: str
) -> None:
    """Raise SandboxStateError when copies, which are attempts at the same work, would write to one directory."""
    given = [options.mounts for options in children]
    direct = [
        path
        for path in guest.mounts
        if any(path in mounts and _writes_are_shared(mounts[path]) for mounts in given)
    ]
    if direct:
        raise SandboxStateError(
            operation,
            f"it and its copies would write to the same mounts ({', '.join(direct)})",
            'Mount HostDir(path, mode="review"), so that each copy has a view of its own, or give the copies the same '
            'directory to read: fork(mounts={path: HostDir(…, mode="ro")})',
        )


def _writes_are_shared(provider: Provider) -> bool:
    """Say whether all mounts of `provider` write to the same thing, and not each to a tree of its own."""
    if isinstance(provider, Router):
        return any(_writes_are_shared(each) for each in provider.providers)
    if isinstance(
        provider, Shadow
    ):  # it may be writable for its private layer, which each mount has its own of
        return _writes_are_shared(provider.inner)
    if isinstance(provider, Wrapper):
        return not provider.readonly and _writes_are_shared(provider.inner)
    return not (provider.readonly or isinstance(provider, Memory))


async def _start_all(
    template: Template, carried: Carried, children: Sequence[SandboxOptions]
) -> list[Guest | TaskvmError]:
    started: list[Guest] = []

    async def start(options: SandboxOptions) -> Guest | TaskvmError:
        try:
            bound = bind_secrets(options.policy, options.secrets, os.urandom)
            guest = await resume(template, options, bound, carried)
        except TaskvmError as error:
            return error
        except OSError as error:  # a full disk, too many open files, the original is being closed
            return HostError(
                "start a copy of a sandbox", error.strerror or str(error), "Free what is missing"
            )
        started.append(guest)
        return guest

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(start(options)) for options in children]
    except BaseException:  # cancelled: nobody gets those that have started
        await close_all(started)
        raise
    return [task.result() for task in tasks]


@contextmanager
def _directory(parent: Path) -> Iterator[Path]:
    path = parent / f"fork-{secrets.token_hex(4)}"
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise HostError(f"make {path}", error.strerror or str(error), "Free disk space") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
