"""A second actor on the host, who replaces things under a mount while the guest uses them, gains the guest nothing.

Judged from the host: what is outside stays as it was, and not a byte of it is in any answer.
"""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.hostile_kernel import O_CREAT, O_TRUNC, O_WRONLY, ROOT, HostileKernel
from tests.support.kernel_mount import MNT_DETACH, libc, need_private_mounts
from tests.support.second_actor import fingerprint, swapping
from tests.support.waiting import PATIENCE_S

from taskvm.fs import syscalls
from taskvm.fs.hostdir import HostDir
from taskvm.wire.fuse import Opcode

CANARY = b"CANARY-of-the-host"
MS_BIND = 4096
NAMES = [b"inner", b"sub", b"other", b"new", b"link"]
READ = struct.pack("<QQIIQII", 0, 0, 65536, 0, 0, 0, 0)
ENTRY_REPLIES = {
    *(Opcode.LOOKUP, Opcode.CREATE, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK)
}


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A workspace with a directory and a link that leads out, to one with the same names."""
    path = tmp_path / "share"
    for directory in (path / "shown", tmp_path / "outside"):
        (directory / "sub").mkdir(parents=True)
        for name in ("inner", "other", "sub/inner", "sub/other"):
            (directory / name).write_bytes(b"workspace" * 1000)
    outside = tmp_path / "outside"
    (outside / CANARY.decode()).write_bytes(CANARY)
    for name in ("inner", "other", "sub/inner", "sub/other"):
        (outside / name).write_bytes(CANARY * 1000)
        os.setxattr(outside / name, "user.canary", CANARY)
    (path / "trap").symlink_to("../outside")
    return path


@pytest.fixture(params=["openat2", "without openat2"])
def kernel(
    share: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HostileKernel]:
    """On hosts of both kinds."""
    if request.param != "openat2":
        monkeypatch.setattr(syscalls, "has_openat2", lambda: False)
    hostile = HostileKernel(HostDir(share))
    yield hostile
    hostile.close()


def setattr_body(valid: int, *, size: int = 0, mode: int = 0) -> bytes:
    return struct.pack("<IIQQQqqqIIIIIIII", valid, 0, 0, size, *[0] * 7, mode, *[0] * 4)


def request(chance: random.Random, nodes: list[int]) -> tuple[int, int, bytes]:
    """One of everything that a kernel can ask about a node and the names in it."""
    node, other = chance.choice(nodes), chance.choice(nodes)
    name, new_name = (chance.choice(NAMES) for _ in "ab")
    named = name + b"\0"
    opened = struct.pack("<IIII", O_CREAT | chance.choice((0, O_TRUNC)), 0o644, 0, 0)
    moved = struct.pack("<QII", other, chance.choice((0, 0, 1, 2)), 0) + named + new_name + b"\0"
    written = struct.pack("<QQIIQII", 0, chance.randrange(99), 5, 0, 0, O_WRONLY, 0) + b"guest"
    return chance.choice(
        (
            *[(Opcode.LOOKUP, node, named)] * 3,
            *[(Opcode.READ, node, READ)] * 3,
            (Opcode.GETATTR, node, bytes(16)),
            (Opcode.READDIR, node, READ),
            (Opcode.READDIRPLUS, node, READ),
            (Opcode.READLINK, node, b""),
            (Opcode.STATFS, node, b""),
            (Opcode.FSYNC, node, bytes(16)),
            (Opcode.FSYNCDIR, node, bytes(16)),
            (Opcode.LSEEK, node, struct.pack("<QQII", 0, 0, chance.choice((3, 4)), 0)),
            (Opcode.LISTXATTR, node, struct.pack("<II", 4096, 0)),
            (Opcode.GETXATTR, node, struct.pack("<II", 4096, 0) + b"user.canary\0"),
            (Opcode.SETXATTR, node, struct.pack("<II", 1, 0) + b"user.canary\0x"),
            (Opcode.REMOVEXATTR, node, b"user.canary\0"),
            (Opcode.SETATTR, node, setattr_body(8, size=chance.randrange(9000))),
            (Opcode.SETATTR, node, setattr_body(1, mode=chance.choice((0o777, 0o700)))),
            (Opcode.SETATTR, node, setattr_body(0x10 | 0x20)),
            (Opcode.WRITE, node, written),
            (Opcode.FALLOCATE, node, struct.pack("<QQQII", 0, 0, 9000, 0, 0)),
            (Opcode.COPY_FILE_RANGE, node, struct.pack("<QQQQQQQ", 0, 0, other, 0, 0, 9000, 0)),
            (Opcode.CREATE, node, opened + named),
            (Opcode.MKNOD, node, struct.pack("<IIII", stat.S_IFREG | 0o644, 0, 0, 0) + named),
            (Opcode.MKDIR, node, struct.pack("<II", 0o755, 0) + named),
            (Opcode.SYMLINK, node, named + b"../outside/inner\0"),
            (Opcode.LINK, node, struct.pack("<Q", other) + named),
            (Opcode.UNLINK, node, named),
            (Opcode.RMDIR, node, named),
            (Opcode.RENAME2, node, moved),
        )
    )


def known(kernel: HostileKernel) -> list[int]:
    """What the guest finds below the name that is a directory half of the time."""
    shown = kernel.lookup(ROOT, b"shown")
    below = [kernel.lookup(shown, name) for name in NAMES] if shown > 0 else []
    return [node for node in (shown, *below) if node > 0]


@pytest.mark.parametrize("seed", range(2))
def test_a_directory_that_becomes_a_link_leads_nowhere(
    kernel: HostileKernel, share: Path, seed: int
) -> None:
    """Whatever is asked of it meanwhile, until each of the two has been met many times."""
    outside = share.parent / "outside"
    before = fingerprint(outside)
    chance = random.Random(seed)
    nodes, outcomes = [2], Counter[int]()

    with swapping(share / "shown", share / "trap"):
        while outcomes[0] < 300 or outcomes[errno.ESTALE] < 100:
            if outcomes.total() % 25 == 0:
                nodes = [*nodes[-20:], *known(kernel)]
            opcode, node, body = request(chance, nodes)
            error, answer = kernel.ask(opcode, node, body)
            outcomes[error] += 1
            assert CANARY not in answer, (Opcode(opcode).name, node)
            if not error and opcode in ENTRY_REPLIES:
                nodes.append(struct.unpack_from("<Q", answer)[0] or 2)

    assert kernel.failures == []
    assert fingerprint(outside) == before


def test_a_file_that_becomes_a_link_leads_nowhere(kernel: HostileKernel, share: Path) -> None:
    """The last component is raced too, between the lookup and every use of what was found."""
    outside = share.parent / "outside"
    (share / "link").symlink_to("../outside/inner")
    before, outcomes = fingerprint(outside), Counter[int]()

    with swapping(share / "shown" / "inner", share / "link"):
        while outcomes[0] < 60 or outcomes[errno.ESTALE] < 12:
            shown = kernel.lookup(ROOT, b"shown")
            node = kernel.lookup(shown, b"inner")
            for opcode, body in (
                (Opcode.SETATTR, setattr_body(1, mode=0o777)),
                (Opcode.SETATTR, setattr_body(8, size=5)),
                (Opcode.SETXATTR, struct.pack("<II", 1, 0) + b"user.canary\0x"),
                (Opcode.READ, READ),
            ):
                error, answer = kernel.ask(opcode, node, body)
                outcomes[error] += 1
                assert CANARY not in answer

    assert fingerprint(outside) == before


def test_what_keeps_its_name_is_not_kept_open(kernel: HostileKernel, share: Path) -> None:
    """A removal that fails must not give the guest a hold on what the host then moves out."""
    (share / "shown" / "sub").chmod(0o700)
    shown = kernel.lookup(ROOT, b"shown")
    inner, sub = (kernel.lookup(shown, name) for name in (b"inner", b"sub"))
    over = struct.pack("<QII", shown, 0, 0) + b"missing\0inner\0"
    assert kernel.ask(Opcode.RMDIR, shown, b"inner\0")[0] == errno.ENOTDIR
    assert kernel.ask(Opcode.RENAME2, shown, over)[0] == errno.ENOENT
    assert kernel.ask(Opcode.RMDIR, shown, b"sub\0")[0] == errno.ENOTEMPTY

    for name in ("inner", "sub"):
        (share / "shown" / name).rename(share.parent / name)
    assert kernel.lookup(shown, b"inner") == -errno.ENOENT

    assert kernel.read(inner)[0] == errno.ESTALE
    assert kernel.write(inner, b"guest")[0] == errno.ESTALE
    assert kernel.ask(Opcode.SETATTR, sub, setattr_body(1, mode=0o777))[0] == errno.ESTALE
    assert (share.parent / "inner").read_bytes() == b"workspace" * 1000
    assert stat.S_IMODE((share.parent / "sub").stat().st_mode) == 0o700


@pytest.mark.parametrize("write", [False, True])
def test_what_takes_the_place_of_a_file_is_never_opened(
    kernel: HostileKernel, share: Path, *, write: bool
) -> None:
    """A writer of a FIFO would wake up, a tape would rewind, a watchdog would start."""
    shown = kernel.lookup(ROOT, b"shown")
    inner = kernel.lookup(shown, b"inner")
    (share / "shown" / "inner").unlink()
    os.mkfifo(share / "shown" / "inner")
    opens = opens_of(share / "shown" / "inner")

    answer = kernel.write(inner, b"guest") if write else kernel.read(inner)

    assert answer[0] == errno.ESTALE
    assert not select.select([opens], [], [], 0)[0]
    reader = os.open(share / "shown" / "inner", os.O_RDONLY | os.O_NONBLOCK)
    assert select.select([opens], [], [], PATIENCE_S)[0]  # an open is seen
    os.close(reader)
    os.close(opens)


def opens_of(path: Path) -> int:
    """Return a descriptor that is readable once somebody opens `path`."""
    instance = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    assert libc.inotify_add_watch(instance, bytes(path), 0x20) > 0  # IN_OPEN
    return int(instance)


def test_sockets_and_devices_of_the_host_keep_their_modes(
    kernel: HostileKernel, share: Path
) -> None:
    """A socket with the mode 0600 in a workspace is closed to the host's other users, and stays so."""
    need_private_mounts()
    os.mknod(share / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mkfifo(share / "fifo", 0o600)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(share / "socket"))
        (share / "socket").chmod(0o600)
        for name in (b"device", b"fifo", b"socket"):
            node = kernel.lookup(ROOT, name)

            assert kernel.ask(Opcode.SETATTR, node, setattr_body(1, mode=0o777))[0] == errno.EPERM
            assert kernel.read(node)[0] == kernel.write(node, b"x")[0] == errno.EINVAL
            assert stat.S_IMODE((share / os.fsdecode(name)).lstat().st_mode) == 0o600


def test_a_file_that_is_mounted_inside_is_out_of_reach(kernel: HostileKernel, share: Path) -> None:
    need_private_mounts()
    outside, place = share.parent / "outside" / "inner", share / "shown" / "inner"
    before = fingerprint(outside.parent)
    assert not libc.mount(bytes(outside), bytes(place), None, MS_BIND, None)
    try:
        shown = kernel.lookup(ROOT, b"shown")
        node = kernel.lookup(shown, b"inner")
        moved = struct.pack("<QII", shown, 0, 0)
        outcomes = [
            kernel.read(node)[0],
            kernel.write(node, b"guest")[0],
            kernel.ask(Opcode.SETATTR, node, setattr_body(1, mode=0o777))[0],
            kernel.ask(Opcode.GETXATTR, node, struct.pack("<II", 99, 0) + b"user.canary\0")[0],
            kernel.ask(Opcode.LINK, shown, struct.pack("<Q", node) + b"new\0")[0],
            kernel.ask(Opcode.UNLINK, shown, b"inner\0")[0],
            kernel.ask(Opcode.RENAME2, shown, moved + b"inner\0new\0")[0],
        ]
        assert outcomes == [errno.EXDEV] * 5 + [errno.EBUSY] * 2
    finally:
        libc.umount2(bytes(place), MNT_DETACH)
    assert fingerprint(outside.parent) == before


def test_the_links_of_proc_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounting /proc is nobody's wish, but what leads out of it leads out of everything."""
    kernel = HostileKernel(HostDir("/proc/self", mode="ro"))
    fds = kernel.lookup(ROOT, b"fd")
    nodes = [kernel.lookup(ROOT, name) for name in (b"root", b"cwd", b"exe")]

    for node in (*nodes, kernel.lookup(fds, b"0")):
        assert kernel.lookup(node, b"etc") == -errno.ESTALE
        assert kernel.read(node)[0] in (errno.EINVAL, errno.ESTALE)
    kernel.close()


def test_a_file_that_shrinks_under_a_read_is_short(kernel: HostileKernel, share: Path) -> None:
    shown = kernel.lookup(ROOT, b"shown")
    inner = kernel.lookup(shown, b"inner")
    assert len(kernel.read(inner)[1]) == 4096

    os.truncate(share / "shown" / "inner", 10)

    assert kernel.read(inner) == (0, b"workspacew")
    os.truncate(share / "shown" / "inner", 0)
    assert kernel.read(inner) == (0, b"")


@pytest.mark.parametrize("how", ["link", "file", "directory"])
def test_what_is_replaced_after_a_listing_is_not_taken_for_it(
    kernel: HostileKernel, share: Path, how: str
) -> None:
    shown = kernel.lookup(ROOT, b"shown")
    error, listing = kernel.ask(Opcode.READDIRPLUS, shown, READ)
    inner = kernel.lookup(shown, b"inner")
    assert (error, b"inner" in listing) == (0, True)
    place = share / "shown" / "inner"
    place.unlink()
    if how == "link":
        place.symlink_to("../../outside/inner")
    elif how == "file":
        place.write_bytes(CANARY)
    else:
        place.mkdir()

    assert kernel.read(inner) == (errno.ESTALE, b"")
    assert kernel.write(inner, b"guest")[0] == errno.ESTALE
    assert kernel.lookup(inner, b"x") == -errno.ESTALE
