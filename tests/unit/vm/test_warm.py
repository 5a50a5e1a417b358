"""taskvm.vm.warm: KVM is judged by what KVM did, not by what the host lacked when it was tried."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taskvm.errors import (
    HostError,
    SandboxLostError,
    TaskvmError,
    UnavailableError,
    UsageError,
)
from taskvm.vm import warm
from taskvm.vm.accel import recall_verdict
from taskvm.vm.command import Boot
from taskvm.vm.qemu import Qemu
from taskvm.vm.template import GuestFiles, Template
from taskvm.vm.warm import Wanted, kvm_fault

QEMU = Qemu(
    path=Path("/usr/bin/qemu"),
    image_tool=Path("/usr/bin/qemu-img"),
    arch="x86_64",
    version="7.2",
    machine="pc-q35-7.2",
)


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    """A machine on a host whose /dev/kvm opens, and which has tried nothing yet."""
    monkeypatch.setenv("TASKVM_CACHE", str(tmp_path))
    monkeypatch.setattr(warm, "kvm_obstacle", lambda arch: None)
    boot = Boot(kernel=tmp_path / "k", initrd=tmp_path / "i", head=tmp_path / "h")
    return Wanted(
        qemu=QEMU,
        guest=GuestFiles(boot=boot, rootfs=tmp_path / "rootfs.ext4", digest="0" * 64),
        accel="auto",
        cpus=1,
        memory_mib=256,
        progress=lambda line: None,
    )


@pytest.mark.parametrize(
    "size",
    [
        {"cpus": 0},
        {"cpus": 65},
        {"cpus": 1.5},
        {"cpus": "2"},
        {"memory_mib": 127},
        {"memory_mib": 512.5},
    ],
)
def test_a_machine_that_there_cannot_be_is_refused(wanted: Wanted, size: dict[str, Any]) -> None:
    """Before QEMU is asked, whose words are about its own options."""
    with pytest.raises(UsageError, match="start a sandbox with (cpus|memory_mib)="):
        replace(wanted, **size)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def make(*_: object, **__: object) -> Template:
        raise error

    monkeypatch.setattr(warm, "ensure_template", make)


async def test_what_the_host_lacked_is_no_verdict_on_kvm(
    wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This start does without it; the next one asks again."""
    fail_with(monkeypatch, HostError("make the memory file", "512 MiB are needed, 3 are free"))

    fault = await kvm_fault(wanted)

    assert fault is not None
    assert "3 are free" in fault
    assert recall_verdict(QEMU) is None


@pytest.mark.parametrize(
    "error",
    [
        SandboxLostError("ask QEMU for stop", "it ended: MSR 0x345"),
        UnavailableError("start QEMU", "it did not come up: KVM says no"),
        TimeoutError(),
    ],
)
async def test_what_kvm_did_is_remembered(
    wanted: Wanted, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_with(monkeypatch, error)

    fault = await kvm_fault(wanted)
    verdict = recall_verdict(QEMU)

    assert verdict is not None
    assert (verdict.works, verdict.reason) == (False, fault)
    assert (error.cause if isinstance(error, TaskvmError) else "boot") in verdict.reason


async def test_the_time_of_a_proof_does_not_run_while_another_process_builds_the_template(
    wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the building itself is limited."""
    limits: list[object] = []

    async def make(*_: object, build_timeout_s: float | None = None) -> Template:
        limits.append(build_timeout_s)
        raise SandboxLostError("boot", "over")

    monkeypatch.setattr(warm, "ensure_template", make)
    monkeypatch.setattr(warm, "PROOF_TIMEOUT_S", 0.0)
    await kvm_fault(wanted)

    assert limits == [0.0]
