"""The command lines of QEMU and of the confining supervisor, with the reason for every argument.

Pure: values in, argument lists out. Descriptors are numbers that the caller will pass on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Accelerator = Literal["kvm", "tcg"]

# Each word with its reason:
#   console=ttyS0    what the kernel and the agent say before the control port works; read and bounded by the host
#   quiet            a verbose boot over an emulated serial line costs about a second without KVM
#   panic=-1         a dead guest reboots at once, which -no-reboot turns into the end of QEMU
#   i8042.nokbd …    probing a keyboard controller that is not there waits 0.5 s
#   tsc=reliable     no watchdog that doubts the emulated clock after a resume
#   no_timer_check   the check loops on the emulated PIT
#   random.trust_cpu the generator is ready at boot; every start is reseeded by the host anyway
#
# Without KVM a start is the emulator's translation of each path of the kernel that runs for the first time (7 us a
# block): code that does not run is time. With the CPU model below and SETTLE_S of vm/template.py, 340-380 ms of CPU
# and not 430-460.
_LEAN = (
    # The guest protects nothing from itself: the border is the virtual machine.
    "mitigations=off init_on_alloc=0 hardened_usercopy=off "
    # Without AppArmor and TOMOYO, which have no policy here and a hook in every lookup of a path; without audit trails
    # and /proc/pressure, which nobody reads.
    "lsm=landlock,yama audit=0 psi=0"
)
KERNEL_ARGUMENTS = {
    "x86_64": (
        "console=ttyS0 quiet panic=-1 i8042.noaux i8042.nokbd tsc=reliable no_timer_check "
        f"random.trust_cpu=on norandmaps {_LEAN}"
    ),
    "aarch64": f"console=ttyAMA0 quiet panic=-1 random.trust_cpu=on {_LEAN}",
}

# Of code that TCG has translated; when it is full, TCG begins anew. Any guest can fill it; its default is 1 GiB.
TRANSLATIONS_MIB = 256
# What QEMU may allocate besides: some 30 MiB of its own, and 8 MiB of stack for each thread, of which block devices
# have up to 64.
OVERHEAD_MIB = 1024

# What the loader, QEMU's libraries and firmware are read from. A path that is not there is passed over.
PROGRAM_PATHS = ("/usr", "/lib", "/lib64", "/nix/store", "/gnu/store", "/opt/homebrew")
CONFIGURATION_PATHS = ("/etc/ld.so.cache", "/etc/ld.so.preload")
DEVICE_PATHS = ("/dev/null", "/dev/zero", "/dev/urandom")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineShape:
    """What a saved state fits: two machines of equal shape can load each other's state.

    `machine` is a versioned machine type such as "pc-q35-7.2"; `memory_mib` mebibytes.
    """

    arch: str
    machine: str
    accelerator: Accelerator
    cpus: int
    memory_mib: int

    @property
    def cpu_model(self) -> str:
        """The model and flags of the virtual CPU.

        Under TCG `max` without erms and fsrm: the guest's kernel then copies with ordinary loops, where TCG
        emulates `rep movsb` a byte at a time (218 against 59 MB/s through a port). Without smap: the emulator keeps an
        address cache for each of its two states. Without la57: a miss walks four tables, not five. Without pku: every
        context switch would save it.
        """
        if self.accelerator == "kvm":
            return "host"
        # pauth-impdef: pointers are signed with a cheap hash, not by the architecture's cipher, which is expensive to
        # emulate (QEMU, docs/system/arm/cpu-features.rst).
        if self.arch == "x86_64":
            return "max,-erms,-fsrm,-smap,-la57,-pku"
        return "max,pauth-impdef=on"

    @property
    def data_limit_bytes(self) -> int:
        """How much private memory QEMU can have (RLIMIT_DATA), whatever a guest makes of it; then it ends."""
        return (self.memory_mib + TRANSLATIONS_MIB + OVERHEAD_MIB) << 20

    @property
    def kernel_arguments(self) -> str:
        return KERNEL_ARGUMENTS[self.arch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptors:
    """Descriptor numbers that QEMU inherits: connected sockets, one each."""

    qmp: int
    console: int
    control: int
    fs: int
    net: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """Kernel and initial file system, as files on the host.

    `head` is the kernel's beginning: enough for QEMU, which insists on a kernel also where the guest has booted.
    """

    kernel: Path
    initrd: Path
    head: Path

    def files(self, *, incoming: bool) -> tuple[Path, ...]:
        """Return what QEMU reads: all of it to boot, next to nothing for a saved state to go on from."""
        return (self.head,) if incoming else (self.kernel, self.initrd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The root disk: qcow2 `layers` from the top, which is written, down; beneath them the raw image `base`."""

    layers: tuple[Path, ...] = ()
    base: Path | None = None


def qemu_command(
    qemu: Path,
    shape: MachineShape,
    *,
    boot: Boot,
    disk: Disk,
    memory: Path | None,
    share_memory: bool,
    incoming: bool,
    descriptors: Descriptors,
) -> list[str]:
    """Return QEMU's argument list.

    `memory` is the file that holds the RAM: written when `share_memory` (a template being made), else mapped
    copy-on-write; None is anonymous memory. With `incoming` QEMU waits for `migrate-incoming`.
    """
    return [
        str(qemu),
        *_BARE,
        "-machine",
        _machine_type(shape),
        "-accel",
        "kvm" if shape.accelerator == "kvm" else f"tcg,tb-size={TRANSLATIONS_MIB}",
        "-cpu",
        shape.cpu_model,
        "-smp",
        str(shape.cpus),
        "-m",
        f"{shape.memory_mib}M",
        "-object",
        _memory_backend(shape, memory, share_memory),
        *_kernel(*boot.files(incoming=incoming)),
        "-append",
        shape.kernel_arguments,
        *_devices(disk, descriptors),
        *(_INCOMING if incoming else []),
    ]


# Paused until it is told to run: the state does not say so. And what is in the state is its devices alone, without a
# head that names the machine; that it fits is sure by other means (TemplateInputs).
_INCOMING = ("-S", "-incoming", "defer", "-global", "migration.send-configuration=off")


# Nothing that is not named exists in the guest, no configuration file of the host is read; and QEMU's own filter beside
# ours: no new processes, no other identity, no scheduling games.
_BARE = (
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-display",
    "none",
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
)


def _kernel(kernel: Path, initrd: Path | None = None) -> list[str]:
    return ["-kernel", str(kernel), *(["-initrd", str(initrd)] if initrd else [])]


def _devices(disk: Disk, descriptors: Descriptors) -> list[str]:
    return [
        "-blockdev",
        json.dumps(_root_node(disk)),
        # The default stops the machine when the host's disk is full, and nobody would let it run on: it gets EIO.
        "-device",
        f"virtio-blk-pci,drive={layer_node(0)},werror=report,rerror=report",
        "-device",
        "virtio-serial-pci,id=ports,max_ports=4",
        *_port("control", descriptors.control),
        *_port("fs", descriptors.fs),
        *_port("net", descriptors.net),
        "-chardev",
        f"socket,id=console,fd={descriptors.console}",
        "-serial",
        "chardev:console",
        "-chardev",
        f"socket,id=qmp,fd={descriptors.qmp}",
        "-mon",
        "chardev=qmp,mode=control",
    ]


def confine_command(
    confine: Path,
    program: list[str],
    *,
    read: list[Path],
    write: list[Path],
    copy_on_write: Path | None,
    file_size_bytes: int,
    data_size_bytes: int | None = None,
    lifeline: int,
    accelerator: Accelerator,
) -> list[str]:
    """Return the argument list that runs `program` under the supervisor (confine/confine.c).

    `read` and `write` are what it may touch besides its own libraries and firmware.
    """
    command = [str(confine), "--lifeline", str(lifeline), "--file-size", str(file_size_bytes)]
    if data_size_bytes is not None:
        command += ["--data-size", str(data_size_bytes)]
    for path in PROGRAM_PATHS:
        command += ["--execute", path]
    for path in CONFIGURATION_PATHS:
        command += ["--read", path]
    for path in (*DEVICE_PATHS, *(["/dev/kvm"] if accelerator == "kvm" else [])):
        command += ["--write", path]
    for item in read:
        command += ["--read", str(item)]
    for item in write:
        command += ["--write", str(item)]
    if copy_on_write is not None:
        command += ["--copy-on-write", str(copy_on_write)]
    return [*command, "--", *program]


def _machine_type(shape: MachineShape) -> str:
    if shape.arch == "x86_64":
        # No controllers for devices that are not there; no System Management Mode, which only firmware uses; no
        # description behind a saved state.
        return (
            f"{shape.machine},memory-backend=ram,vmport=off,smm=off,usb=off,sata=off,smbus=off,"
            "graphics=off,dump-guest-core=off,suppress-vmdesc=on"
        )
    return (
        f"{shape.machine},memory-backend=ram,gic-version=3,dump-guest-core=off,suppress-vmdesc=on"
    )


def _memory_backend(shape: MachineShape, memory: Path | None, share: bool) -> str:
    size = f"id=ram,size={shape.memory_mib}M"
    if memory is None:
        return f"memory-backend-ram,{size}"
    return (
        f"memory-backend-file,{size},mem-path={_escaped(memory)},share={'on' if share else 'off'}"
    )


def layer_node(number: int) -> str:
    """The name of the layer that is written: 0 at the start, one more after each cut."""
    return f"disk{number}"


def top_layer(number: int, path: str, *, locking: bool = True) -> dict[str, object]:
    """Return the block node of a layer that is written, without what lies beneath it.

    A file that QEMU is handed as descriptors is not locked: QEMU would keep one of them with a writer's lock, and
    refuse the other as a reader's when the layer is no more on top.
    """
    # no-flush: the overlay is thrown away with the sandbox, so nothing is worth an fsync on the host.
    cache = {"direct": False, "no-flush": True}
    return {
        "driver": "qcow2",
        "node-name": layer_node(number),
        "file": {
            "driver": "file",
            "filename": path,
            "locking": "auto" if locking else "off",
            "discard": "unmap",
            "cache": cache,
        },
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "cache": cache,
    }


def disk_beneath(layers: Sequence[Path], base: Path) -> dict[str, object]:
    """Return the block node of what is only read: every file and format named here, none taken from a file's header."""
    node: dict[str, object] = {"driver": "raw", "file": _file(base)}
    for path in reversed(layers):
        node = {"driver": "qcow2", "file": _file(path), "backing": node}
    return node


def _root_node(disk: Disk) -> dict[str, object]:
    assert disk.base is not None, "a machine's disk lies above an image"
    top, *others = disk.layers
    return {**top_layer(0, str(top)), "backing": disk_beneath(others, disk.base)}


def _file(path: Path) -> dict[str, object]:
    return {"driver": "file", "filename": str(path)}


def _port(name: str, descriptor: int) -> list[str]:
    return [
        "-chardev",
        f"socket,id={name},fd={descriptor}",
        "-device",
        f"virtserialport,chardev={name},name=taskvm.{name}",
    ]


def _escaped(path: Path) -> str:
    """A path inside a QEMU option list: a comma is written twice (qemu-options(7), -drive file=)."""
    return str(path).replace(",", ",,")
