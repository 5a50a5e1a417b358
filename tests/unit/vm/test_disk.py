"""Disks as files: what several layers say, in one; judged by QEMU's own tools. Covers taskvm.vm.disk."""

import json
import random
import struct
import subprocess
from pathlib import Path

import pytest

from taskvm.errors import HostError
from taskvm.vm.command import Disk, disk_beneath
from taskvm.vm.disk import create_layer, disk_size, flatten, read_header
from taskvm.wire.qcow2 import CLUSTER, encode_empty

MIB = 1 << 20
SIZE = 40 * MIB


def qemu_io(node: dict[str, object], *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", *words, f"json:{json.dumps(node)}"], check=True, capture_output=True)


def compared(disk: Disk, flat: Path) -> subprocess.CompletedProcess[str]:
    """What qemu-img says of the two: the layers, and the one file above the same base."""
    assert disk.base is not None
    sides = [disk_beneath(layers, disk.base) for layers in (disk.layers, [flat])]
    command = ["qemu-img", "compare", *(f"json:{json.dumps(side)}" for side in sides)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A raw image that has something everywhere."""
    path = tmp_path / "base"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.mark.parametrize("seed", range(4))
def test_a_flat_disk_says_what_its_layers_say(base: Path, tmp_path: Path, seed: int) -> None:
    """Random writes, zeros and discards in four layers; the file is sound and holds no more than they do."""
    dice = random.Random(seed)
    disk = Disk(base=base)
    for number in range(4):
        path = tmp_path / f"layer{number}"
        create_layer(path, disk)
        disk = Disk(layers=(path, *disk.layers), base=base)
        commands = []
        for _ in range(12):
            start = dice.randrange(0, SIZE - MIB, 512)
            kind = dice.choice([f"write -P {dice.randrange(1, 256)}", "write -z", "discard"])
            commands.append(f"{kind} {start} {dice.randrange(512, MIB, 512)}")
        qemu_io(disk_beneath(disk.layers, base), *commands)

    flat = tmp_path / "flat"
    flatten(disk, flat)

    assert compared(disk, flat).stdout == "Images are identical.\n"
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", flat], check=True)
    assert flat.stat().st_size <= sum(layer.stat().st_size for layer in disk.layers)
    assert not read_header(flat).names_backing
    assert disk_size(Disk(layers=(flat,), base=base)) == SIZE


def test_a_large_disk_has_tables_for_all_of_it(tmp_path: Path) -> None:
    """Several tables of the second level, and more clusters than one block of reference counts has room for."""
    base, top, flat = (tmp_path / name for name in ("base", "top", "flat"))
    base.touch()
    with base.open("r+b") as file:
        file.truncate(6 << 30)
    create_layer(top, Disk(base=base))
    disk = Disk(layers=(top,), base=base)
    zeros = [f"write -z {gib}G 1G" for gib in range(5)]
    qemu_io(disk_beneath([top], base), *zeros, "write -P 7 5G 70M", "write -P 9 6143M 1M")

    flatten(disk, flat)

    assert compared(disk, flat).stdout == "Images are identical.\n"
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", flat], check=True)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (1 << 62 | CLUSTER, "compressed"),
        (1 << 63 | 1 << 40, "outside"),
        (CLUSTER + 512, "outside"),
        (1 << 57 | CLUSTER, "outside"),
    ],
)
def test_a_layer_whose_tables_lie_is_refused(tmp_path: Path, entry: int, reason: str) -> None:
    """A QEMU that was taken over writes what it likes; nothing outside of its own file is read."""
    content = bytearray(encode_empty(SIZE)) + bytes(CLUSTER)
    struct.pack_into(">Q", content, len(content) - CLUSTER, entry)
    header_l1 = struct.unpack_from(">Q", content, 40)[0]
    struct.pack_into(">Q", content, header_l1, 1 << 63 | len(content) - CLUSTER)
    layer, base = tmp_path / "layer", tmp_path / "base"
    layer.write_bytes(content)
    base.write_bytes(bytes(MIB))

    with pytest.raises(HostError, match=reason):
        flatten(Disk(layers=(layer,), base=base), tmp_path / "flat")


def test_a_file_that_is_there_is_not_written_over(base: Path, tmp_path: Path) -> None:
    create_layer(tmp_path / "layer", Disk(base=base))
    (tmp_path / "flat").write_bytes(b"mine")

    with pytest.raises(HostError, match="File exists"):
        flatten(Disk(layers=(tmp_path / "layer",), base=base), tmp_path / "flat")

    assert (tmp_path / "flat").read_bytes() == b"mine"
