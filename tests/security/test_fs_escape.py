"""Attacks on the workspace file system by a guest whose kernel is hostile: hand-made messages on the port.

Each attack is judged by what the host's files say afterwards, not by the answer alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.hostile_kernel import (
    MOUNT,
    O_CREAT,
    O_EXCL,
    ROOT,
    HostileKernel,
)
from tests.support.waiting import PATIENCE_S

from taskvm.errors import GuestProtocolError
from taskvm.fs.descriptors import KEPT, PINNED
from taskvm.fs.hostdir import HostDir
from taskvm.wire.frames import FrameType, encode_header
from taskvm.wire.fuse import Opcode

SECRET = b"the host's secret"


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A workspace beside a file that the guest must never reach."""
    path = tmp_path / "share"
    (path / "directory").mkdir(parents=True)
    (path / "file").write_bytes(b"workspace")
    (path / "directory" / "inner").write_bytes(b"inner")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "inner").write_bytes(SECRET)
    (tmp_path / "secret").write_bytes(SECRET)
    return path


@pytest.fixture
def kernel(share: Path) -> Iterator[HostileKernel]:
    hostile = HostileKernel(HostDir(share))
    yield hostile
    hostile.close()


BAD_NAMES = [b"", b".", b"..", b"/", b"/etc/passwd", b"../secret", b"directory/inner", b"a\0b"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize(
    ("opcode", "head"),
    [
        (Opcode.LOOKUP, b""),
        (Opcode.UNLINK, b""),
        (Opcode.RMDIR, b""),
        (Opcode.MKDIR, struct.pack("<II", 0o755, 0)),
        (Opcode.MKNOD, struct.pack("<IIII", stat.S_IFREG | 0o644, 0, 0, 0)),
        (Opcode.CREATE, struct.pack("<IIII", O_CREAT, 0o644, 0, 0)),
        (Opcode.LINK, struct.pack("<Q", 2)),
        (Opcode.RENAME2, struct.pack("<QII", ROOT, 0, 0) + b"file\0"),
        (Opcode.RENAME, struct.pack("<Q", ROOT) + b"file\0"),
    ],
)
def test_a_name_that_is_no_component_ends_the_sandbox(
    kernel: HostileKernel, share: Path, opcode: int, head: bytes, name: bytes
) -> None:
    kernel.send(kernel.message(opcode, ROOT, head + name + b"\0"))

    assert kernel.failed.wait(timeout=PATIENCE_S)
    assert isinstance(kernel.failures[0], GuestProtocolError)
    assert kernel.sock.recv(1) == b""
    assert sorted(entry.name for entry in share.iterdir()) == ["directory", "file"]
    assert (share.parent / "secret").read_bytes() == SECRET


@pytest.mark.parametrize(
    "name", [b"x" * 256, b"x" * 4095, b"\xff\xfe", b"trailing ", b"\n", b"\x1b[2J", b"..."]
)
def test_odd_names_are_only_names(kernel: HostileKernel, name: bytes) -> None:
    assert kernel.lookup(ROOT, name) in (-errno.ENOENT, -errno.ENAMETOOLONG)


TARGETS = [b"/etc/passwd", b"../secret", b"/proc/self/root/etc/passwd", b"directory", b"."]


@pytest.mark.parametrize("target", TARGETS)
def test_a_symbolic_link_is_never_followed(
    kernel: HostileKernel, share: Path, target: bytes
) -> None:
    error, body = kernel.ask(Opcode.SYMLINK, ROOT, b"link\0" + target + b"\0")
    assert error == 0
    link = struct.unpack_from("<Q", body)[0]

    assert kernel.ask(Opcode.READLINK, link) == (0, target)
    assert kernel.lookup(link, b"inner") == -errno.ESTALE
    assert kernel.read(link)[0] == errno.EINVAL
    assert kernel.write(link, b"x")[0] == errno.EINVAL
    assert kernel.setattr(link, 8, size=0)[0] == errno.EINVAL
    assert kernel.create(ROOT, b"link", 0o644)[0] == errno.ESTALE
    assert kernel.create(ROOT, b"link", 0o644, O_EXCL)[0] == errno.EEXIST
    assert os.fsencode((share / "link").readlink()) == target


def test_a_parent_swapped_for_a_link_leads_nowhere(kernel: HostileKernel, share: Path) -> None:
    directory = kernel.lookup(ROOT, b"directory")
    (share / "directory").rename(share / "elsewhere")
    (share / "directory").symlink_to("../outside")

    assert kernel.lookup(directory, b"inner") == -errno.ESTALE
    assert kernel.create(directory, b"planted", 0o644)[0] == errno.ESTALE
    assert [entry.name for entry in (share.parent / "outside").iterdir()] == ["inner"]


def test_a_file_swapped_for_a_link_is_not_opened(kernel: HostileKernel, share: Path) -> None:
    file = kernel.lookup(ROOT, b"file")
    (share / "file").unlink()
    (share / "file").symlink_to("../secret")

    assert kernel.read(file) == (errno.ESTALE, b"")
    assert kernel.write(file, b"overwritten")[0] == errno.ESTALE
    assert kernel.setattr(file, 1, mode=0o777)[0] == errno.ESTALE
    assert (share.parent / "secret").read_bytes() == SECRET


def test_a_file_swapped_for_another_is_not_mistaken_for_it(
    kernel: HostileKernel, share: Path
) -> None:
    file = kernel.lookup(ROOT, b"file")
    (share / "other").write_bytes(b"other")
    (share / "other").rename(share / "file")

    assert kernel.read(file) == (errno.ESTALE, b"")


def test_what_the_host_moves_out_is_out_of_reach_a_second_later(
    share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("taskvm.fs.hosttree.time.monotonic", lambda: now[0])
    kernel = HostileKernel(HostDir(share))
    directory = kernel.lookup(ROOT, b"directory")
    assert kernel.lookup(directory, b"inner") > 0

    (share / "directory").rename(share.parent / "moved")
    now[0] += 1.0

    assert kernel.lookup(directory, b"inner") == -errno.ESTALE
    kernel.close()


def test_an_open_file_that_the_host_moves_out_is_out_of_reach_a_second_later(
    share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("taskvm.fs.hosttree.time.monotonic", lambda: now[0])
    kernel = HostileKernel(HostDir(share))
    (share / "rotated").write_bytes(b"old")
    (share / "deleted").write_bytes(b"old")
    nodes = [kernel.lookup(ROOT, name) for name in (b"file", b"rotated", b"deleted")]
    for node in nodes:
        assert kernel.write(node, b"x")[0] == 0

    (share / "file").rename(share.parent / "moved")
    (share / "rotated").rename(share / "directory" / "rotated")
    (share / "deleted").unlink()
    now[0] += 1.0

    assert [kernel.write(node, b"y")[0] for node in nodes] == [errno.ESTALE, 0, 0]
    assert kernel.setattr(nodes[0], 1, mode=0o777)[0] == errno.ESTALE
    assert (share.parent / "moved").read_bytes() == b"xorkspace"
    assert (share / "directory" / "rotated").read_bytes() == b"yld"
    kernel.close()


def test_nothing_but_regular_files_is_opened(kernel: HostileKernel, share: Path) -> None:
    os.mkfifo(share / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(share / "socket"))
        nodes = [kernel.lookup(ROOT, name) for name in (b"fifo", b"socket", b"directory")]

        answers = [(kernel.read(node)[0], kernel.write(node, b"x")[0]) for node in nodes]

    assert answers == [(errno.EINVAL, errno.EINVAL)] * 2 + [(errno.EISDIR, errno.EISDIR)]


def test_a_file_swapped_for_a_fifo_does_not_hang_the_server(
    kernel: HostileKernel, share: Path
) -> None:
    file = kernel.lookup(ROOT, b"file")
    (share / "file").unlink()
    os.mkfifo(share / "file")

    assert kernel.read(file)[0] == errno.ESTALE
    assert kernel.write(file, b"x")[0] == errno.ESTALE


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_devices_are_not_made(kernel: HostileKernel, share: Path, kind: int) -> None:
    body = struct.pack("<IIII", kind | 0o666, 0x0103, 0, 0) + b"device\0"

    assert kernel.ask(Opcode.MKNOD, ROOT, body)[0] == errno.EPERM
    assert not (share / "device").exists()


def test_set_id_bits_are_never_set(kernel: HostileKernel, share: Path) -> None:
    (share / "directory").chmod(0o2777)
    directory = kernel.lookup(ROOT, b"directory")

    _error, body = kernel.create(directory, b"made", 0o6755)
    node = struct.unpack_from("<Q", body)[0]
    kernel.setattr(node, 1, mode=0o106777)
    kernel.ask(Opcode.MKDIR, ROOT, struct.pack("<II", 0o6755, 0) + b"dir\0")
    kernel.ask(Opcode.MKNOD, ROOT, struct.pack("<IIII", stat.S_IFREG | 0o6755, 0, 0, 0) + b"node\0")

    assert stat.S_IMODE((share / "directory" / "made").stat().st_mode) == 0o777
    assert stat.S_IMODE((share / "dir").stat().st_mode) == 0o755
    assert stat.S_IMODE((share / "node").stat().st_mode) == 0o755


def test_nothing_that_is_made_in_a_setgid_directory_runs_as_its_group(
    kernel: HostileKernel, share: Path
) -> None:
    """CVE-2022-0358: there a file gets the directory's group, and must not get the bit. A directory inherits both, as
    it does from any program of the host's."""
    (share / "directory").chmod(0o2777)
    directory = kernel.lookup(ROOT, b"directory")

    _error, body = kernel.ask(Opcode.MKDIR, directory, struct.pack("<II", 0o6777, 0) + b"below\0")
    below = struct.unpack_from("<Q", body)[0]
    for parent in (directory, below):
        kernel.create(parent, b"created", 0o6775)
        made = struct.pack("<IIII", stat.S_IFREG | 0o6775, 0, 0, 0) + b"made\0"
        assert kernel.ask(Opcode.MKNOD, parent, made)[0] == 0
        kernel.setattr(kernel.lookup(parent, b"made"), 1, mode=0o102775)

    files = [path for path in (share / "directory").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["created", "created", "inner", "made", "made"]
    for path in files:
        assert not path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)
    assert not (share / "directory" / "below").stat().st_mode & stat.S_ISUID
    assert kernel.setattr(below, 1, mode=0o042777)[0] == 0
    assert not (share / "directory" / "below").stat().st_mode & stat.S_ISGID


@pytest.mark.parametrize("change", ["write", "truncate"])
def test_a_set_id_program_that_is_changed_loses_the_bit(
    kernel: HostileKernel, share: Path, change: str
) -> None:
    (share / "file").chmod(0o6755)
    file = kernel.lookup(ROOT, b"file")

    if change == "write":
        assert kernel.write(file, b"payload")[0] == 0
    else:
        assert kernel.setattr(file, 8, size=0)[0] == 0

    assert stat.S_IMODE((share / "file").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    "name", [b"security.capability", b"trusted.x", b"system.posix_acl_access", b"user", b"USER.x"]
)
def test_only_user_attributes_exist(kernel: HostileKernel, share: Path, name: bytes) -> None:
    file = kernel.lookup(ROOT, b"file")
    value = b"\1\0\0\2" + bytes(16)

    set_ = struct.pack("<II", len(value), 0) + name + b"\0" + value
    assert kernel.ask(Opcode.SETXATTR, file, set_)[0] == errno.EOPNOTSUPP
    get = struct.pack("<II", 100, 0) + name + b"\0"
    assert kernel.ask(Opcode.GETXATTR, file, get)[0] == errno.EOPNOTSUPP
    assert os.listxattr(share / "file") == []


def test_owners_cannot_be_changed(kernel: HostileKernel, share: Path) -> None:
    file = kernel.lookup(ROOT, b"file")
    before = (share / "file").stat()

    assert kernel.setattr(file, 2, uid=before.st_uid + 1)[0] == errno.EPERM
    assert kernel.setattr(file, 4, gid=before.st_gid + 1)[0] == errno.EPERM
    assert ((share / "file").stat().st_uid, (share / "file").stat().st_gid) == (
        before.st_uid,
        before.st_gid,
    )


@pytest.mark.parametrize("node", [0, 2, 999, 2**63, 2**64 - 1])
def test_a_node_that_was_never_given_is_stale(kernel: HostileKernel, node: int) -> None:
    assert kernel.lookup(node, b"file") == -errno.ESTALE
    assert kernel.read(node)[0] == errno.ESTALE
    assert kernel.ask(Opcode.GETATTR, node, bytes(16))[0] == errno.ESTALE


def test_forgetting_too_much_only_hurts_the_guest(kernel: HostileKernel) -> None:
    file = kernel.lookup(ROOT, b"file")

    for node in (file, ROOT, 12345):
        kernel.send(kernel.message(Opcode.FORGET, node, struct.pack("<Q", 2**64 - 1)))

    assert kernel.read(file)[0] == errno.ESTALE
    assert kernel.lookup(ROOT, b"file") > 0


def test_a_guest_cannot_exhaust_the_descriptors(
    kernel: HostileKernel, share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes and removes without end, and forgets nothing. What is written is read back, or was not removed."""
    for account in (KEPT, PINNED):
        monkeypatch.setattr(account, "_limit", lambda: 100)
    before = len(list(Path("/proc/self/fd").iterdir()))

    removed = []
    for number in range(300):
        error, body = kernel.create(ROOT, b"file%d" % number, 0o644)
        node = struct.unpack_from("<Q", body)[0]
        assert (error, kernel.write(node, b"x")[0]) == (0, 0)
        removed.append(kernel.ask(Opcode.UNLINK, ROOT, b"file%d\0" % number)[0])
        assert kernel.read(node) == (0, b"x")

    assert (removed[0], removed[-1]) == (0, errno.ENFILE)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2 * 100
    kernel.close()
    assert len(list(Path("/proc/self/fd").iterdir())) < before


def test_a_mount_point_inside_is_not_entered(kernel: HostileKernel, share: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(share / "directory"), b"tmpfs", 0, None):
        pytest.skip("mounting needs root: NOT run")
    try:
        (share / "directory" / "inner").write_bytes(SECRET)
        directory = kernel.lookup(ROOT, b"directory")
        assert kernel.lookup(directory, b"inner") == -errno.EXDEV
    finally:
        libc.umount2(os.fsencode(share / "directory"), 2)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        bytes(16),
        bytes(40),
        struct.pack("<IIQQIIIHH", 41, 3, 2, 1, 0, 0, 0, 0, 0),
        struct.pack("<IIQQIIIHH", 40, 3, 2, 1, 0, 0, 0, 0, 0),
        struct.pack("<IIQQIIIHH", 40, 1, 2, 1, 0, 0, 0, 1, 0),
        struct.pack("<IIQQIIIHH", 80, 15, 2, 1, 0, 0, 0, 0, 0)
        + struct.pack("<QQIIQII", 0, 0, 2**32 - 1, 0, 0, 0, 0),
        struct.pack("<IIQQIIIHH", 80, 15, 2, 1, 0, 0, 0, 0, 0)
        + struct.pack("<QQIIQII", 0, 2**63, 10, 0, 0, 0, 0),
        struct.pack("<IIQQIIIHH", 48, 42, 2, 1, 0, 0, 0, 0, 0) + struct.pack("<II", 2**31, 0),
    ],
)
def test_a_malformed_message_ends_this_sandbox_only(
    kernel: HostileKernel, share: Path, message: bytes
) -> None:
    other = HostileKernel(HostDir(share))

    kernel.send(message)

    assert kernel.failed.wait(timeout=PATIENCE_S)
    assert isinstance(kernel.failures[0], GuestProtocolError)
    assert other.lookup(ROOT, b"file") > 0
    other.close()


def test_a_guest_that_reads_no_answers_stops_only_its_own_thread(share: Path) -> None:
    (share / "big").write_bytes(bytes(1 << 20))
    kernel = HostileKernel(HostDir(share))
    big = kernel.lookup(ROOT, b"big")
    request = struct.pack("<QQIIQII", 0, 0, 1 << 20, 0, 0, 0, 0)

    flood = encode_header(FrameType.FUSE, 0, MOUNT, 80) + kernel.message(Opcode.READ, big, request)
    kernel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # else what a host says
    kernel.sock.settimeout(1)
    with pytest.raises(TimeoutError):
        kernel.sock.sendall(flood * 50_000)

    assert kernel.server._outgoing_size <= 2 << 20
    kernel.server.close()
    assert not kernel.server._thread.is_alive()
    kernel.sock.close()
