"""What a sandbox starts from: the host's QEMU, the accelerator that works, and the template for the wanted shape."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Literal

from taskvm.errors import TaskvmError, UnavailableError, UsageError
from taskvm.vm.accel import PROOF_TIMEOUT_S, kvm_obstacle, recall_verdict, remember_verdict
from taskvm.vm.command import Accelerator, MachineShape
from taskvm.vm.control import Control
from taskvm.vm.disk import create_overlay
from taskvm.vm.machine import Machine, MachineFiles
from taskvm.vm.qemu import Qemu
from taskvm.vm.rundir import RunDir
from taskvm.vm.template import GuestFiles, Progress, Template, ensure_template
from taskvm.wire.control import Done, PingRequest

AcceleratorChoice = Literal["auto", "kvm", "tcg"]

MIN_MEMORY_MIB = 128
MAX_CPUS = 64


def shape_for(qemu: Qemu, accelerator: Accelerator, cpus: int, memory_mib: int) -> MachineShape:
    """Return the shape of a machine. Raises UsageError for sizes that no guest boots with."""
    if not 1 <= cpus <= MAX_CPUS:
        raise UsageError(f"start a sandbox with cpus={cpus}", f"it must be 1 to {MAX_CPUS}")
    if memory_mib < MIN_MEMORY_MIB:
        raise UsageError(
            f"start a sandbox with memory_mib={memory_mib}", f"it must be at least {MIN_MEMORY_MIB}"
        )
    return MachineShape(
        arch=qemu.arch,
        machine=qemu.machine,
        accelerator=accelerator,
        cpus=cpus,
        memory_mib=memory_mib,
    )


async def prepare(
    qemu: Qemu,
    guest: GuestFiles,
    choice: AcceleratorChoice,
    cpus: int,
    memory_mib: int,
    progress: Progress,
) -> Template:
    """Return the template to fork from, finding out about KVM first when `choice` is "auto".

    Raises UnavailableError when `choice` is "kvm" and KVM does not run guests here.
    """
    accelerator = await _choose(qemu, guest, choice, cpus, memory_mib, progress)
    shape = shape_for(qemu, accelerator, cpus, memory_mib)
    return await ensure_template(qemu, shape, guest, progress)


async def boot_cold(
    qemu: Qemu,
    guest: GuestFiles,
    choice: AcceleratorChoice,
    cpus: int,
    memory_mib: int,
    progress: Progress,
    run_dir: Path,
) -> tuple[Machine, Accelerator]:
    """Return a machine that has begun to boot, with its disk in `run_dir`. Raises as `prepare`."""
    accelerator = await _choose(qemu, guest, choice, cpus, memory_mib, progress)
    disk = run_dir / "disk.qcow2"
    await create_overlay(qemu, disk, guest.rootfs, "raw")
    files = MachineFiles(boot=guest.boot, disk=disk, backing=(guest.rootfs,))
    shape = shape_for(qemu, accelerator, cpus, memory_mib)
    return await Machine.start(qemu, shape, files), accelerator


async def _choose(
    qemu: Qemu,
    guest: GuestFiles,
    choice: AcceleratorChoice,
    cpus: int,
    memory_mib: int,
    progress: Progress,
) -> Accelerator:
    if choice != "tcg":
        reason = await _kvm_fault(qemu, guest, cpus, memory_mib, progress)
        if reason is None:
            return "kvm"
        if choice == "kvm":
            raise UnavailableError(
                "start a sandbox with KVM", reason, "Use accel='auto' or 'tcg' (slower)"
            )
    return "tcg"


async def _kvm_fault(
    qemu: Qemu, guest: GuestFiles, cpus: int, memory_mib: int, progress: Progress
) -> str | None:
    """Why KVM is not used, or None when it has run a guest."""
    obstacle = kvm_obstacle(qemu.arch)
    if obstacle is not None:
        return obstacle
    verdict = recall_verdict(qemu)
    if verdict is None:
        progress("finding out whether KVM works on this host (once per boot of the host)")
        fault = await _try_kvm(qemu, guest, shape_for(qemu, "kvm", cpus, memory_mib), progress)
        verdict = remember_verdict(qemu, works=fault is None, reason=fault or "ran a guest")
        if fault is not None:
            progress(f"KVM does not run guests here, using TCG, which is slower: {fault}")
    return None if verdict.works else verdict.reason


async def _try_kvm(
    qemu: Qemu, guest: GuestFiles, shape: MachineShape, progress: Progress
) -> str | None:
    try:
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            template = await ensure_template(qemu, shape, guest, progress)
            await _answer_once(template)
    except TimeoutError:
        return f"a guest did not boot, save, fork and answer within {PROOF_TIMEOUT_S:.0f} s"
    except TaskvmError as error:
        return f"{error.operation}: {error.cause}".split("; the guest's console:")[0][:500]
    return None


async def _answer_once(template: Template) -> None:
    run_dir = RunDir.create(f"proof-{template.path.name[:12]}-{os.getpid()}")
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
