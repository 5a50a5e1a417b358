"""Disks as files: what several layers say, in one; judged by QEMU's own tools. Covers taskvm.vm.disk."""

import json
import random
import struct
import subprocess
from pathlib import Path

import pytest

from taskvm.errors import HostError
from taskvm.limits import MOST_DISK_SIZE_MIB
from taskvm.vm.command import Disk, disk_beneath
from taskvm.vm.disk import check_layer, create_layer, disk_size, flatten, read_header
from taskvm.wire.qcow2 import CLUSTER, MAX_DISK_BYTES, TABLE_ENTRIES, encode_empty

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


def with_tables(tables: list[int], entries: list[int], size: int = 4 << 30) -> bytes:
    """A disk whose first table leads to clusters behind it by their numbers; each of these is full of `entries`."""
    content = bytearray(encode_empty(size))
    end = len(content)
    first = struct.unpack_from(">Q", content, 40)[0]
    for place, number in enumerate(tables):
        struct.pack_into(">Q", content, first + 8 * place, end + number * CLUSTER)
    for _ in range(max(tables) + 1):
        content += struct.pack(">Q", 1) * TABLE_ENTRIES
        for place, entry in enumerate(entries):
            struct.pack_into(">Q", content, len(content) - CLUSTER + 8 * place, entry)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (with_tables([0] * 8, [1]), "same place"),
        (with_tables([0], [CLUSTER, CLUSTER]), "same place"),
        (with_tables([0, 1], [CLUSTER]), "same place"),
        (with_tables(list(range(200)), [1], 100 << 30), "more of it is zeros"),
        (with_tables([0, 1], [1])[:-1], "outside of the file"),
        (with_tables([0], [1])[:-CLUSTER] + bytes(4), "outside of the file"),
    ],
)
def test_a_small_file_that_becomes_a_large_disk_is_refused(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    """Tables or clusters that are named again and again, zeros without end, a table that is cut off: from elsewhere."""
    layer = tmp_path / "layer"
    layer.write_bytes(content)

    with pytest.raises(HostError, match=reason):
        flatten(Disk(layers=(layer,)), tmp_path / "flat")
    assert not (tmp_path / "flat").exists()
    if "zeros" not in reason:
        with pytest.raises(HostError, match=reason), layer.open("rb") as file:
            check_layer(layer, file)


def test_no_disk_is_larger_than_a_sandbox_may_have() -> None:
    assert MAX_DISK_BYTES == MOST_DISK_SIZE_MIB << 20


def test_zeros_behind_the_end_of_the_base_are_left_out(base: Path, tmp_path: Path) -> None:
    """There are zeros anyway, and a guest that trims a large disk says so of each cluster; what they hide stays hid."""
    large, top, flat = (tmp_path / name for name in ("large", "top", "flat"))
    large.write_bytes(encode_empty(SIZE * 2))
    create_layer(top, Disk(layers=(large,), base=base))
    qemu_io(disk_beneath([large], base), f"write -P 3 {SIZE} 1M", "write -P 4 0 1M")
    qemu_io(disk_beneath([top, large], base), f"write -z {SIZE - MIB} {SIZE}")

    flatten(Disk(layers=(top, large), base=base), flat)

    assert compared(Disk(layers=(top, large), base=base), flat).stdout == "Images are identical.\n"
    assert flat.stat().st_size < 30 * CLUSTER


def test_what_would_fill_the_disk_is_refused_before_it_is_begun(base: Path, tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    create_layer(layer, Disk(base=base))
    qemu_io(disk_beneath([layer], base), "write -P 3 0 1M")

    with pytest.raises(HostError, match="must remain"):
        flatten(Disk(layers=(layer,), base=base), tmp_path / "flat", spare_bytes=1 << 60)
    assert not (tmp_path / "flat").exists()


def test_a_copy_that_nobody_waits_for_ends_early(base: Path, tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    create_layer(layer, Disk(base=base))
    qemu_io(disk_beneath([layer], base), "write -P 3 0 1M")

    flatten(Disk(layers=(layer,), base=base), tmp_path / "flat", stop=lambda: True)

    assert b"\3" * 4096 not in (tmp_path / "flat").read_bytes()


def test_a_file_that_is_there_is_not_written_over(base: Path, tmp_path: Path) -> None:
    create_layer(tmp_path / "layer", Disk(base=base))
    (tmp_path / "flat").write_bytes(b"mine")

    with pytest.raises(HostError, match="File exists"):
        flatten(Disk(layers=(tmp_path / "layer",), base=base), tmp_path / "flat")

    assert (tmp_path / "flat").read_bytes() == b"mine"
