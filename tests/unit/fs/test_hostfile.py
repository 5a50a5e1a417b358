"""taskvm.fs.hostfile: a single file of the host, under this host's kernel where that has a part in it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.kernel_mount import KernelMount
from tests.support.waiting import eventually

from taskvm.errors import UsageError
from taskvm.fs.hostdir import HostDir
from taskvm.fs.hostfile import HostFile
from taskvm.fs.provider import ROOT, Change, Provider
from taskvm.fs.router import Router
from taskvm.wire.fuse import SetAttr, SetAttrField

Mount = Callable[[Provider], KernelMount]


@pytest.fixture
def file(host: Path) -> Path:
    """A file with a neighbour that is a secret."""
    (host / "neighbour").write_text("secret")
    path = host / "app.conf"
    path.write_text("one\n")
    return path


@pytest.fixture
def served(file: Path) -> Iterator[HostFile]:
    provider = HostFile(file).opened()
    yield provider
    provider.close()


def replace(path: Path, text: str) -> None:
    """Save as editors do."""
    path.with_name("new").write_text(text)
    path.with_name("new").rename(path)


def failure(call: Callable[[], object]) -> int:
    with pytest.raises(OSError, match="Errno") as caught:
        call()
    return caught.value.errno or 0


@pytest.mark.parametrize("name", ["missing", "directory", "pipe", "way/on"])
def test_only_a_regular_file_can_be_served(host: Path, name: str) -> None:
    (host / "directory").mkdir()
    os.mkfifo(host / "pipe")
    (host / "way").write_text("")

    with pytest.raises(UsageError, match=name):
        HostFile(host / name)


def test_a_mode_that_is_none_is_refused(file: Path) -> None:
    with pytest.raises(UsageError, match="review"):
        HostFile(file, mode="review")  # type: ignore[arg-type]  # the mistake


def test_a_link_and_a_home_are_resolved_once(
    file: Path, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(host))
    (host / "link").symlink_to("app.conf")

    assert HostFile("~/link").path == file


def test_a_file_is_read_written_and_cut_in_place(kernel_mount: Mount, file: Path) -> None:
    inode = file.stat().st_ino
    mounted = kernel_mount(HostFile(file)).path

    with mounted.open("a") as opened:
        opened.write("two\n")
    appended = file.read_text()
    mounted.write_text("three\n")
    mounted.chmod(0o640)
    os.utime(mounted, ns=(5, 7))

    assert appended == "one\ntwo\n"
    assert file.read_text() == "three\n"
    status = file.stat()
    assert (status.st_ino, status.st_mode & 0o777, status.st_mtime_ns) == (inode, 0o640, 7)
    assert mounted.stat().st_ino == inode


def test_what_the_host_saves_is_seen_however_it_saves(kernel_mount: Mount, file: Path) -> None:
    """In place, by rename, by removing first; through a file that is open, too."""
    mounted = kernel_mount(HostFile(file)).path
    mounted.read_text()

    with mounted.open() as opened:
        file.write_text("in place\n")
        assert eventually(lambda: mounted.read_text() == "in place\n")
        replace(file, "renamed\n")
        assert eventually(lambda: mounted.read_text() == "renamed\n")
        assert opened.read() == "renamed\n"
    file.unlink()
    assert eventually(lambda: not mounted.exists())
    file.write_text("anew\n")
    assert eventually(lambda: mounted.exists() and mounted.read_text() == "anew\n")


def test_what_is_written_after_a_replacement_goes_to_the_new_file(
    kernel_mount: Mount, file: Path
) -> None:
    mounted = kernel_mount(HostFile(file)).path
    with mounted.open("a") as opened:
        opened.write("guest\n")
        opened.flush()
        file.rename(file.with_name("old"))
        file.write_text("host\n")
        assert eventually(lambda: mounted.read_text() == "host\n")
        opened.write("guest again\n")

    assert file.read_text() == "host\nguest again\n"
    assert file.with_name("old").read_text() == "one\nguest\n"


def test_it_cannot_be_removed_or_replaced_by_the_guest(kernel_mount: Mount, file: Path) -> None:
    mounted = kernel_mount(HostFile(file)).path
    mounted.with_name("mine").write_text("mine")

    assert failure(mounted.unlink) == errno.EBUSY
    assert failure(lambda: mounted.with_name("mine").rename(mounted)) == errno.EBUSY
    assert file.read_text() == "one\n"


@pytest.mark.parametrize("in_its_place", ["directory", "link", "pipe"])
def test_nothing_but_a_file_takes_its_place(
    served: HostFile, file: Path, in_its_place: str
) -> None:
    """A link would lead the guest elsewhere, and a kernel ends a mount whose root changes its type."""
    served.read(ROOT, 0, 10)
    file.unlink()
    {
        "directory": file.mkdir,
        "link": lambda: file.symlink_to("neighbour"),
        "pipe": lambda: os.mkfifo(file),
    }[in_its_place]()
    served.sources()[0].ready()

    assert failure(lambda: served.getattr(ROOT)) == errno.ENOENT
    assert failure(lambda: served.read(ROOT, 0, 10)) == errno.ENOENT
    assert failure(lambda: served.write(ROOT, 0, memoryview(b"x"), append=False)) == errno.ENOENT
    assert (file.with_name("neighbour")).read_text() == "secret"


def test_nothing_beside_it_has_a_name_or_a_number(served: HostFile, file: Path) -> None:
    """Whatever a guest asks, it gets nothing but the file: the neighbours stay as they were, and unread."""
    taken: list[bytes] = []
    for node in range(1, 50):
        for name in (b"neighbour", b"app.conf", b".."):
            for call in (
                lambda node=node, name=name: served.lookup(node, name),
                lambda node=node, name=name: served.create(node, name, 0o644, os.O_TRUNC),
                lambda node=node, name=name: served.unlink(node, name),
                lambda node=node, name=name: served.rename(node, name, ROOT, b"x", 0),
                lambda node=node, name=name: served.rename(ROOT, b"x", node, name, 0),
                lambda node=node, name=name: served.link(ROOT, node, name),
                lambda node=node: served.readdir(node, 0, 4096),
            ):
                assert failure(call) in (
                    errno.ENOENT, errno.ENOSYS, errno.EPERM, errno.ENOTDIR, errno.ESTALE,
                )  # fmt: skip
        if node != ROOT:
            assert failure(lambda node=node: served.read(node, 0, 10)) == errno.ESTALE
            assert failure(lambda node=node: served.getattr(node)) == errno.ESTALE
            size = SetAttr(SetAttrField.SIZE, 0, 0, 0, 0, 0, 0)
            assert failure(lambda node=node, size=size: served.setattr(node, size)) == errno.ESTALE
        else:
            taken.append(served.read(node, 0, 10))

    assert taken == [b"one\n"]
    assert {path.name: path.read_text() for path in file.parent.iterdir()} == {
        "app.conf": "one\n",
        "neighbour": "secret",
    }


def test_changes_of_the_neighbours_are_nobodys_business(served: HostFile, file: Path) -> None:
    told: list[Change] = []
    served.changes = told.append
    served.getattr(ROOT)

    file.with_name("neighbour").write_text("changed")
    file.with_name("more").write_text("more")
    served.sources()[0].ready()
    assert told == []
    file.write_text("changed")
    served.sources()[0].ready()
    assert told == [Change(ROOT)]


def test_a_file_that_nobody_watches_is_found_anew(
    host: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS: the guest asks again after a second, and is told to drop what it has read."""
    monkeypatch.setattr("taskvm.fs.coherence.LOCAL", frozenset())
    provider, told = HostFile(file).opened(), list[Change]()
    provider.changes = told.append
    provider.read(ROOT, 0, 10)

    replace(file, "two\n")
    _attr, lifetime = provider.getattr(ROOT)

    assert lifetime.attr_ns == 1_000_000_000
    assert told == [Change(ROOT)]
    assert provider.read(ROOT, 0, 10) == b"two\n"
    provider.close()


def test_a_read_only_file_stays_as_it_is(kernel_mount: Mount, file: Path) -> None:
    mounted = kernel_mount(HostFile(file, mode="ro")).path

    assert mounted.read_text() == "one\n"
    assert failure(lambda: mounted.write_text("x")) == errno.EROFS
    assert failure(lambda: mounted.chmod(0o600)) == errno.EROFS
    assert file.read_text() == "one\n"


def test_a_saved_guest_goes_on_with_the_file_that_is_there_by_then(
    kernel_mount: Mount, file: Path
) -> None:
    mount = kernel_mount(HostFile(file))
    with mount.path.open("a+") as opened:
        opened.write("guest\n")
        opened.flush()
        state = mount.save()
        replace(file, "meanwhile\n")
        mount.take_up(HostFile(file), state)

        assert eventually(lambda: mount.path.read_text() == "meanwhile\n")
        opened.write("later\n")

    assert file.read_text() == "meanwhile\nlater\n"


def test_a_router_can_have_a_file_among_its_routes(kernel_mount: Mount, file: Path) -> None:
    mounted = kernel_mount(Router({"/etc/app.conf": HostFile(file)})).path

    (mounted / "etc" / "app.conf").write_text("two\n")

    assert [(path.name, path.is_file()) for path in (mounted / "etc").iterdir()] == [
        ("app.conf", True)
    ]
    assert file.read_text() == "two\n"
    assert failure((mounted / "etc" / "app.conf").unlink) == errno.EBUSY


def test_a_route_stays_where_the_host_replaces_what_it_covers(
    kernel_mount: Mount, host: Path, file: Path
) -> None:
    """Unlike a mount on a file of another mount, which ends with that file."""
    (host / "covered").mkdir()
    (host / "covered" / "app.conf").write_text("below\n")
    routed = Router({"/": HostDir(host / "covered"), "/app.conf": HostFile(file)})
    mounted = kernel_mount(routed).path
    (mounted / "app.conf").read_text()

    replace(host / "covered" / "app.conf", "replaced below\n")
    (host / "covered" / "later").write_text("")

    assert eventually(lambda: (mounted / "later").exists())
    assert (mounted / "app.conf").read_text() == "one\n"


@pytest.mark.parametrize("path", ["/", "/a"])
def test_a_router_has_no_file_where_a_directory_must_be(file: Path, path: str) -> None:
    with pytest.raises(UsageError, match="directory"):
        Router({path: HostFile(file), "/a/b": HostFile(file)})
