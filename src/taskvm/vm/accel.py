"""Which accelerator this host really has: believed when it has run a guest, not when a device node exists.

`/dev/kvm` can exist, open, create a VM and still never run one (seen on nested hosts: QEMU aborts on an MSR with
`-cpu host`, or spins). So KVM is proven by boot, save, fork and an answer of the guest's agent within a short
time; the verdict is
remembered for this boot of the host and this QEMU.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import msgspec

from taskvm.paths import cache_dir, replace_file
from taskvm.vm.qemu import Qemu, host_arch

KVM_DEVICE = Path("/dev/kvm")
# A guest boots in about a second with KVM; ten times that is a device that does not work.
PROOF_TIMEOUT_S = 15.0
_KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h
_KVM_API_VERSION = 12


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether KVM ran a guest on this boot of the host with this QEMU, and if not, why."""

    boot_id: str
    qemu: str
    works: bool
    reason: str


def kvm_obstacle(arch: str) -> str | None:
    """Return why KVM cannot even be tried here, or None when it can."""
    if arch != host_arch():
        return f"KVM runs {host_arch()} guests on this host, not {arch}"
    try:
        descriptor = os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = " (add yourself to the group kvm)" if isinstance(error, PermissionError) else ""
        return f"open {KVM_DEVICE}: {error.strerror}{hint}"
    try:
        version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION)
    except OSError as error:
        return f"ask {KVM_DEVICE} for its version: {error.strerror}"
    finally:
        os.close(descriptor)
    return None if version == _KVM_API_VERSION else f"{KVM_DEVICE} has API version {version}"


def recall_verdict(qemu: Qemu) -> Verdict | None:
    """Return what was found out earlier on this boot of the host with this QEMU."""
    try:
        verdict = msgspec.json.decode(_note(qemu.arch).read_bytes(), type=Verdict)
    except (OSError, msgspec.MsgspecError):
        return None
    current = verdict.boot_id == _boot_id() and verdict.qemu == _identity(qemu)
    return verdict if current else None


def remember_verdict(qemu: Qemu, *, works: bool, reason: str) -> Verdict:
    """Write down whether KVM ran a guest, and return the verdict."""
    verdict = Verdict(boot_id=_boot_id(), qemu=_identity(qemu), works=works, reason=reason)
    replace_file(_note(qemu.arch), msgspec.json.encode(verdict))
    return verdict


def _note(arch: str) -> Path:
    return cache_dir() / f"kvm-{arch}.json"


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _identity(qemu: Qemu) -> str:
    return f"{qemu.path} {qemu.version}"
