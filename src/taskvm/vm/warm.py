"""What a sandbox starts from: the host's QEMU, the accelerator that works, and the template for the wanted shape."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from taskvm.errors import HostError, TaskvmError, UnavailableError, UsageError
from taskvm.identity import GuestUser, host_user
from taskvm.paths import hold
from taskvm.vm.accel import PROOF_TIMEOUT_S, kvm_obstacle, recall_verdict, remember_verdict
from taskvm.vm.command import Accelerator, MachineShape
from taskvm.vm.control import Control
from taskvm.vm.disk import create_layer
from taskvm.vm.machine import DISK_LIMIT_BYTES, Machine, MachineFiles
from taskvm.vm.qemu import Qemu
from taskvm.vm.rundir import RunDir
from taskvm.vm.template import GuestFiles, Progress, Template, ensure_template
from taskvm.wire.control import Done, PingRequest

AcceleratorChoice = Literal["auto", "kvm", "tcg"]

MIN_MEMORY_MIB = 128
MAX_CPUS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The machine that somebody wants. `progress` is told about work that takes seconds."""

    qemu: Qemu
    guest: GuestFiles
    accel: AcceleratorChoice
    cpus: int
    memory_mib: int
    progress: Progress
    user: GuestUser = field(default_factory=host_user)

    def __post_init__(self) -> None:
        if not isinstance(self.cpus, int) or not 1 <= self.cpus <= MAX_CPUS:
            raise UsageError(
                f"start a sandbox with cpus={self.cpus!r}", f"it must be 1 to {MAX_CPUS}"
            )
        if not isinstance(self.memory_mib, int) or self.memory_mib < MIN_MEMORY_MIB:
            raise UsageError(
                f"start a sandbox with memory_mib={self.memory_mib!r}",
                f"it must be a whole number, at least {MIN_MEMORY_MIB}",
            )

    def shape(self, accelerator: Accelerator) -> MachineShape:
        """The machine's shape when `accelerator` runs it."""
        return MachineShape(
            arch=self.qemu.arch,
            machine=self.qemu.machine,
            accelerator=accelerator,
            cpus=self.cpus,
            memory_mib=self.memory_mib,
        )


async def prepare(wanted: Wanted) -> Template:
    """Return the template to fork from, finding out about KVM first when the choice is "auto".

    Raises UnavailableError when the choice is "kvm" and KVM does not run guests here.
    """
    shape = wanted.shape(await choose_accelerator(wanted))
    return await _template(wanted, shape)


async def _template(
    wanted: Wanted, shape: MachineShape, build_timeout_s: float | None = None
) -> Template:
    image = hold(wanted.guest.rootfs.parent)
    try:
        return await ensure_template(
            wanted.qemu,
            shape,
            wanted.guest,
            wanted.user,
            wanted.progress,
            build_timeout_s=build_timeout_s,
        )
    finally:
        os.close(image)


async def boot_cold(
    wanted: Wanted, run_dir: Path, *, disk_limit_bytes: int = DISK_LIMIT_BYTES
) -> Machine:
    """Return a machine that has begun to boot, with its disk in `run_dir`. Raises as `prepare`."""
    accelerator = await choose_accelerator(wanted)
    disk = run_dir / "disk.qcow2"
    create_layer(disk, wanted.guest.disk())
    files = MachineFiles(
        boot=wanted.guest.boot,
        disk=wanted.guest.disk(disk),
        disk_limit_bytes=disk_limit_bytes,
    )
    return await Machine.start(wanted.qemu, wanted.shape(accelerator), files)


async def choose_accelerator(wanted: Wanted) -> Accelerator:
    """Return what will run the guest. Raises UnavailableError when "kvm" was demanded and does not work."""
    if wanted.accel == "tcg":
        return "tcg"
    reason = await kvm_fault(wanted)
    if reason is None:
        return "kvm"
    if wanted.accel == "kvm":
        raise UnavailableError(
            "start a sandbox with KVM", reason, "Use accel='auto' or 'tcg' (slower)"
        )
    return "tcg"


async def kvm_fault(wanted: Wanted) -> str | None:
    """Return why KVM is not used on this host, or None when it has run a guest.

    It is tried once, which may take PROOF_TIMEOUT_S twice. What the host lacked for that, such as disk space, is no
    verdict on KVM: it is not remembered.
    """
    obstacle = kvm_obstacle(wanted.qemu.arch)
    if obstacle is not None:
        return obstacle
    verdict = recall_verdict(wanted.qemu)
    if verdict is None:
        wanted.progress("finding out whether KVM works on this host (once per boot of the host)")
        try:
            fault = await _try_kvm(wanted)
        except HostError as error:
            return f"it could not be tried: {error.operation}: {error.cause}"[:500]
        verdict = remember_verdict(
            wanted.qemu, works=fault is None, reason=fault or "it ran a guest"
        )
        if fault is not None:
            wanted.progress(f"KVM does not run guests here, using TCG, which is slower: {fault}")
    return None if verdict.works else verdict.reason


async def _try_kvm(wanted: Wanted) -> str | None:
    """Return what is wrong with KVM. Raises HostError when something else is in the way."""
    attempt = "boot and be saved"
    try:
        template = await _template(wanted, wanted.shape("kvm"), PROOF_TIMEOUT_S)
        attempt = "fork and answer"
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            await _answer_once(template)
    except TimeoutError:
        return f"a guest did not {attempt} within {PROOF_TIMEOUT_S:.0f} s"
    except TaskvmError as error:
        if isinstance(error, HostError) and not isinstance(error, UnavailableError):
            raise
        return f"{error.operation}: {error.cause}"[:500]
    return None


async def _answer_once(template: Template) -> None:
    run_dir = RunDir.create(f"proof-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        machine = await template.fork(run_dir.path)
        try:
            control = await Control.open(machine.take("control"))
            try:
                await machine.execute("cont")
                await control.request(PingRequest(), Done, "ask the guest for an answer")
            finally:
                control.port.close()
        finally:
            await machine.kill()
    finally:
        run_dir.remove()
