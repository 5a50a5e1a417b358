"""The command lines: what QEMU is given, and what the supervisor lets it touch."""

import itertools
import json
from pathlib import Path

import pytest

from taskvm.vm.command import (
    Boot,
    Descriptors,
    Disk,
    MachineShape,
    confine_command,
    qemu_command,
)

SHAPE = MachineShape(arch="x86_64", machine="pc-q35-7.2", accelerator="tcg", cpus=2, memory_mib=512)
BOOT = Boot(kernel=Path("/i/vmlinuz"), initrd=Path("/i/initrd"), head=Path("/i/head"))
DISK = Disk(
    layers=(Path("/run/a,readonly=on/disk.qcow2"), Path("/t/disk.qcow2")), base=Path("/i/r")
)
DESCRIPTORS = Descriptors(qmp=10, console=11, control=12, fs=13, net=14)


def command(shape: MachineShape = SHAPE, **changes: object) -> list[str]:
    options = {
        "boot": BOOT,
        "disk": DISK,
        "memory": Path("/t/ram"),
        "share_memory": False,
        "incoming": True,
        "descriptors": DESCRIPTORS,
    }
    return qemu_command(Path("/usr/bin/qemu"), shape, **{**options, **changes})  # type: ignore[arg-type]


def test_nothing_exists_that_is_not_named() -> None:
    """No default devices, no configuration files, QEMU's own sandbox on, and no network device at all."""
    words = command()

    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(words)
    assert words[words.index("-sandbox") + 1].startswith("on,")
    assert "spawn=deny" in words[words.index("-sandbox") + 1]
    assert not [
        word
        for word in words
        if "net" in word
        and "taskvm.net" not in word
        and "id=net" not in word
        and "chardev=net" not in word
    ]


def test_a_fork_maps_memory_privately_and_waits_for_state() -> None:
    """A fork's memory is copy-on-write, its state comes later, and it is paused then."""
    words = command()

    assert "share=off" in words[words.index("-object") + 1]
    assert words[words.index("-incoming") + 1] == "defer"
    assert "-S" in words


def test_a_fork_reads_no_kernel_and_no_initial_file_system() -> None:
    """Both are in its memory: QEMU would hold a second copy of each."""
    fork, booting = command(), command(incoming=False)

    assert fork[fork.index("-kernel") + 1] == "/i/head"
    assert "-initrd" not in fork
    assert booting[booting.index("-kernel") + 1] == "/i/vmlinuz"
    assert booting[booting.index("-initrd") + 1] == "/i/initrd"


def test_a_template_being_made_shares_its_memory_and_boots() -> None:
    """Only the machine that makes a template writes to the memory file."""
    words = command(share_memory=True, incoming=False)

    assert "share=on" in words[words.index("-object") + 1]
    assert "-incoming" not in words


def test_every_file_and_format_of_the_disk_is_named() -> None:
    """What a layer's header says of the file beneath it is never asked, nor what a guest writes at a disk's start."""
    words = command()
    top = json.loads(words[words.index("-blockdev") + 1])

    chain = [top, top["backing"], top["backing"]["backing"]]
    assert [node["driver"] for node in chain] == ["qcow2", "qcow2", "raw"]
    assert [node["file"]["filename"] for node in chain] == [
        "/run/a,readonly=on/disk.qcow2",
        "/t/disk.qcow2",
        "/i/r",
    ]
    assert {node["file"]["driver"] for node in chain} == {"file"}


@pytest.mark.parametrize(
    ("accelerator", "arch", "model"),
    [
        ("tcg", "x86_64", "max,-erms,-fsrm,-smap,-la57,-pku"),
        ("kvm", "x86_64", "host"),
        ("tcg", "aarch64", "max,pauth-impdef=on"),
    ],
)
def test_the_cpu_model_fits_the_accelerator(accelerator: str, arch: str, model: str) -> None:
    """TCG gets no string instructions that it emulates bytewise; KVM gets the host's processor."""
    shape = MachineShape(
        arch=arch,
        machine="m",
        accelerator=accelerator,
        cpus=1,
        memory_mib=128,  # type: ignore[arg-type]
    )

    assert shape.cpu_model == model


def test_the_supervisor_gives_write_access_to_the_disk_alone() -> None:
    """Memory, images and firmware are for reading; /dev/kvm only with KVM."""
    words = confine_command(
        Path("/c"),
        ["/usr/bin/qemu"],
        read=[Path("/i/rootfs")],
        write=[Path("/run/disk.qcow2")],
        copy_on_write=Path("/t/ram"),
        file_size_bytes=1024,
        lifeline=7,
        accelerator="tcg",
    )

    pairs = list(itertools.pairwise(words))
    written = [value for option, value in pairs if option == "--write"]
    assert written == ["/dev/null", "/dev/zero", "/dev/urandom", "/run/disk.qcow2"]
    assert ("--copy-on-write", "/t/ram") in pairs
    assert ("--read", "/i/rootfs") in pairs
    assert words[-2:] == ["--", "/usr/bin/qemu"]
