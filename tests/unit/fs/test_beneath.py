"""taskvm.fs.beneath does what openat2(2) does: the same descriptor, or the same refusal, for everything."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.kernel_mount import KernelMount, libc, need_private_mounts

from taskvm.fs import beneath, syscalls
from taskvm.fs.hostdir import HostDir
from taskvm.fs.provider import Provider

MS_BIND = 4096
PATHS = [
    *(b".", b"file", b"sub", b"sub/file", b"sub/./file", b"sub//file", b"none", b"sub/none"),
    *(b"..", b"sub/../..", b"/etc/passwd", b"link", b"up", b"absolute", b"link/file", b"up/x"),
    *(b"loop", b"fifo", b"socket", b"file/x", b"mounted", b"mounted/file", b"", b"sub/"),
]
CONTENT = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
FLAGS = [
    os.O_PATH,
    os.O_PATH | os.O_NOFOLLOW,
    os.O_PATH | os.O_DIRECTORY,
    os.O_RDONLY | CONTENT,
    os.O_RDWR | CONTENT,
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One of each: links in and out, a FIFO, a socket, and a bind mount of the same file system."""
    need_private_mounts()
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "mounted").mkdir()
    (root / "sub" / "file").write_text("text")
    (root / "file").write_text("text")
    for name, target in {"link": "sub", "up": "..", "absolute": "/etc", "loop": "loop"}.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("of nobody's business")
    assert not libc.mount(bytes(outside), bytes(root / "mounted"), None, MS_BIND, None)
    return root


def outcome(
    opening: Callable[[int, bytes, int], int], root: int, path: bytes, flags: int
) -> object:
    try:
        fd = opening(root, path, flags)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    try:
        assert not os.get_inheritable(fd)
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def test_both_ways_lead_to_the_same(tree: Path) -> None:
    """Where one is refused, so is the other; which of several errors it is may differ."""
    root = os.open(tree, os.O_PATH)
    assert syscalls.has_openat2()

    for path, flags in itertools.product(PATHS, FLAGS):
        real = outcome(syscalls.open_beneath, root, path, flags)
        ours = outcome(beneath.open_beneath, root, path, flags)
        if b".." in path.split(b"/") or path in (b"", b"sub/"):
            continue
        assert ours == real, (path, oct(flags))

    for path in (b"..", b"sub/../..", b"sub/..", b"mounted/file", b"absolute/passwd"):
        assert isinstance(outcome(beneath.open_beneath, root, path, os.O_PATH), str), path
    os.close(root)


def test_magic_links_are_not_followed() -> None:
    """Those of /proc lead anywhere."""
    process = os.open("/proc/self", os.O_PATH)

    for name in (b"root", b"cwd", b"exe", b"fd/0"):
        assert outcome(beneath.open_beneath, process, name, os.O_PATH) == "ELOOP"
    os.close(process)


def test_a_mount_works_without_openat2(
    kernel_mount: Callable[[Provider], KernelMount], tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading, writing and making, and what is mounted inside is as closed as before."""
    monkeypatch.setattr(syscalls, "has_openat2", lambda: False)
    guest = kernel_mount(HostDir(tree)).path

    (guest / "sub" / "new").write_text("new")
    (guest / "sub" / "new").rename(guest / "moved")

    assert (tree / "moved").read_text() == "new"
    assert (guest / "sub" / "file").read_text() == "text"
    with pytest.raises(OSError, match="device link"):
        list((guest / "mounted").iterdir())
