"""A hostile kernel that takes what it can: depth, offsets, sizes, listings. It costs bounded memory and time."""

from __future__ import annotations

import errno
import random
import struct
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from tests.support.hostile_kernel import ROOT, HostileKernel

from taskvm.fs import listings
from taskvm.fs.hooks import Hooks
from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.provider import Provider
from taskvm.fs.quota import Quota
from taskvm.fs.router import Router
from taskvm.fs.shadow import Shadow
from taskvm.wire.fuse import Opcode

DEPTH = 1200  # more than a path of the host's own calls can have, and than Python calls itself


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "share"
    path.mkdir()
    (path / "file").write_bytes(b"workspace")
    yield path
    subprocess.run(["rm", "-rf", path], check=True)  # deeper than Python removes


def composed(share: Path) -> Provider:
    routed = Router({"/": HostDir(share), "/cache/deep": Memory()})
    hidden = Shadow(routed, [".env", "/secrets/", "a/**/b.key"], private=Memory())
    return Hooks(Quota(hidden, limit_bytes=1 << 30, limit_files=10_000))


@pytest.mark.parametrize("make", [HostDir, composed])
def test_directories_without_end_are_served_or_refused(share: Path, make: type[HostDir]) -> None:
    """Made one in another, looked up again from the top, moved, and removed by the host under the guest's feet."""
    kernel = HostileKernel(make(share))
    node, made = ROOT, [ROOT]

    for _ in range(DEPTH):
        error, body = kernel.ask(Opcode.MKDIR, node, struct.pack("<II", 0o755, 0) + b"d\0")
        assert error == 0
        node = struct.unpack_from("<Q", body)[0]
        made.append(node)
    for parent, child in pairwise(made):
        assert kernel.lookup(parent, b"d") == child
    error, body = kernel.create(node, b"bottom", 0o644)
    assert (error, kernel.write(struct.unpack_from("<Q", body)[0], b"x")[0]) == (0, 0)
    moved = struct.pack("<QII", made[2], 0, 0) + b"d\0moved\0"
    assert kernel.ask(Opcode.RENAME2, made[1], moved)[0] == errno.EINVAL  # into itself
    moved = struct.pack("<QII", ROOT, 0, 0) + b"d\0moved\0"
    assert kernel.ask(Opcode.RENAME2, made[DEPTH // 2], moved)[0] == 0
    assert kernel.lookup(node, b"bottom") > 0

    subprocess.run(["rm", "-rf", share / "moved"], check=True)
    assert kernel.create(node, b"more", 0o644)[0] in (errno.ESTALE, errno.ENOENT)
    assert kernel.lookup(ROOT, b"file") > 0
    assert kernel.failures == []
    kernel.close()


@pytest.mark.parametrize("make", [HostDir, composed])
def test_listings_that_begin_anywhere_and_never_end_hold_few_descriptors(
    share: Path, make: type[HostDir]
) -> None:
    """The last ones that were begun are kept, to go on where they stopped; those that could not begin are not."""
    for number in range(300):
        (share / f"file{number}").touch()
    kernel, chance = HostileKernel(make(share)), random.Random(1)
    kernel.read(kernel.lookup(ROOT, b"file"))
    held = len(list(Path("/proc/self/fd").iterdir()))

    for _ in range(500):
        offset = chance.choice((0, 1, chance.randrange(2**64), 2**63, 2**64 - 1, 2**63 - 1))
        size = chance.choice((0, 1, 24, 4096, 1 << 20))
        opcode = chance.choice((Opcode.READDIR, Opcode.READDIRPLUS, Opcode.OPENDIR))
        body = struct.pack("<QQIIQII", chance.randrange(2**64), offset, size, 0, 0, 0, 0)
        error, _told = kernel.ask(opcode, ROOT, body if opcode != Opcode.OPENDIR else bytes(8))
        assert error in (0, errno.EINVAL, errno.ENOSYS)

    assert len(list(Path("/proc/self/fd").iterdir())) <= held + listings.MOST + 5
    assert kernel.lookup(ROOT, b"file") > 0
    assert kernel.failures == []
    kernel.close()


@pytest.mark.parametrize("make", [HostDir, composed])
def test_sizes_without_end_take_no_space(share: Path, make: type[HostDir]) -> None:
    """Exabytes by every way to ask for them. A hole takes none; a host that gives no such file says so."""
    kernel = HostileKernel(make(share))
    file = kernel.lookup(ROOT, b"file")

    for size in (2**50, 2**60, 2**63 - 1):
        assert kernel.setattr(file, 8, size=size)[0] in (0, errno.EFBIG, errno.EDQUOT)
        assert kernel.write(file, b"x", offset=size - 1)[0] in (0, errno.EFBIG, errno.EDQUOT)
        body = struct.pack("<QQQII", 0, 0, size, 0, 0)
        error, _told = kernel.ask(Opcode.FALLOCATE, file, body)
        assert error in (errno.EFBIG, errno.EDQUOT, errno.ENOSPC, errno.EOPNOTSUPP)
        copied = struct.pack("<QQQQQQQ", 0, 0, file, 0, size - 1, size, 0)
        kernel.ask(Opcode.COPY_FILE_RANGE, file, copied)
        kernel.setattr(file, 8, size=9)

    assert (share / "file").read_bytes() == b"workspace"
    assert (share / "file").stat().st_blocks * 512 < 1 << 20
    assert kernel.failures == []
    kernel.close()
