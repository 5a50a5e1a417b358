"""taskvm.fs.hostdir, on taskvm.fs.hostattributes: what its nodes are while the host changes things underneath."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.capabilities import as_an_ordinary_user

from taskvm.errors import UsageError
from taskvm.fs import hosttree, specials
from taskvm.fs.descriptors import LEAST, Account
from taskvm.fs.hostdir import HostDir
from taskvm.fs.provider import ROOT
from taskvm.wire.fuse import SetAttr, SetAttrField


@pytest.fixture
def host(tmp_path: Path) -> Path:
    path = tmp_path / "host"
    path.mkdir()
    return path


@pytest.fixture
def provider(host: Path) -> Iterator[HostDir]:
    served = HostDir(host)
    yield served
    served.close()


def node(provider: HostDir, *names: bytes) -> int:
    """Look a path up, as a kernel does."""
    at = ROOT
    for name in names:
        at = provider.lookup(at, name).node
    return at


def put(provider: HostDir, file: int, data: bytes, offset: int = 0) -> int:
    return provider.write(file, offset, memoryview(data), append=False)


def failure(call: Callable[..., object], *arguments: object) -> int:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        call(*arguments)
    return caught.value.errno or 0


def truncated(size: int) -> SetAttr:
    return SetAttr(SetAttrField.SIZE, size, 0, 0, 0, 0, 0)


def mode(permissions: int) -> SetAttr:
    return SetAttr(SetAttrField.MODE, 0, 0, 0, permissions, 0, 0)


def listed(provider: HostDir, directory: int, size: int = 1024) -> list[bytes]:
    names: list[bytes] = []
    offset = 0
    while batch := provider.readdir(directory, offset, size):
        names += [entry.name for entry in batch]
        offset = batch[-1].offset
    return names


@pytest.mark.parametrize("make", [Path.touch, lambda path: None])
def test_what_is_no_directory_cannot_be_served(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "it")
    with pytest.raises(UsageError, match="serve the directory"):
        HostDir(tmp_path / "it")


def test_a_mode_that_does_not_exist_is_refused(host: Path) -> None:
    with pytest.raises(UsageError, match="Use direct, ro or review"):
        HostDir(host, mode="rw")  # type: ignore[arg-type] - the mistake


def test_a_relative_path_and_a_link_are_resolved_once(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host / "file").touch()
    (host.parent / "link").symlink_to("host")
    monkeypatch.chdir(host.parent)
    provider = HostDir("link")

    monkeypatch.chdir("/")
    (host.parent / "link").unlink()

    assert provider.path == host
    assert node(provider, b"file") > ROOT
    provider.close()


def test_hard_links_are_one_node(provider: HostDir, host: Path) -> None:
    (host / "a").touch()
    (host / "b").hardlink_to(host / "a")
    assert node(provider, b"a") == node(provider, b"b")

    provider.unlink(ROOT, b"b")

    assert put(provider, node(provider, b"a"), b"text") == 4
    assert (host / "a").read_text() == "text"


def test_a_file_is_found_by_the_name_that_the_host_has_left_it(
    provider: HostDir, host: Path
) -> None:
    (host / "a").write_text("text")
    (host / "b").hardlink_to(host / "a")
    file = node(provider, b"a")
    assert node(provider, b"b") == file

    (host / "b").unlink()

    assert provider.read(file, 0, 10) == b"text"
    provider.link(file, ROOT, b"c")
    assert (host / "c").read_text() == "text"
    assert provider.getattr(file)[0].st_nlink == 2


def test_a_file_is_found_when_the_host_has_moved_it_there_and_back(
    provider: HostDir, host: Path
) -> None:
    (host / "there").write_text("text")
    file = node(provider, b"there")
    for old, new in (("there", "away"), ("away", "there"), ("there", "away"), ("away", "there")):
        (host / old).rename(host / new)
        assert node(provider, os.fsencode(new)) == file

    assert provider.getattr(file)[0].st_size == 4
    (host / "there").rename(host / "away")
    assert failure(provider.getattr, file) == errno.ESTALE
    (host / "away").rename(host / "there")
    assert provider.read(file, 0, 10) == b"text"  # although nobody has looked it up again


def test_an_open_file_survives_its_removal_under_a_name_that_the_host_gave_it(
    provider: HostDir, host: Path
) -> None:
    (host / "a").write_text("text")
    file = node(provider, b"a")
    (host / "a").rename(host / "b")
    assert node(provider, b"b") == file

    provider.unlink(ROOT, b"b")

    assert provider.read(file, 0, 10) == b"text"


def test_an_open_file_survives_its_removal_when_the_host_has_removed_its_other_name(
    provider: HostDir, host: Path
) -> None:
    (host / "a").write_text("text")
    (host / "b").hardlink_to(host / "a")
    (host / "kept").hardlink_to(host / "a")  # so that its other name may be anywhere
    file = node(provider, b"a")
    assert node(provider, b"b") == file
    (host / "a").unlink()

    provider.unlink(ROOT, b"b")

    assert provider.read(file, 0, 10) == b"text"


def test_what_the_guest_takes_for_two_names_of_a_file_is_moved_when_it_is_not(
    provider: HostDir, host: Path
) -> None:
    (host / "a").write_text("text")
    (host / "b").hardlink_to(host / "a")
    file = node(provider, b"a")
    assert node(provider, b"b") == file
    provider.rename(ROOT, b"a", ROOT, b"b", 0)
    assert sorted(path.name for path in host.iterdir()) == ["a", "b"]
    (host / "new").write_text("new")
    (host / "new").rename(host / "b")

    provider.rename(ROOT, b"a", ROOT, b"b", 0)

    assert [path.name for path in host.iterdir()] == ["b"]
    assert (host / "b").read_text() == "text"
    assert provider.read(file, 0, 10) == b"text"
    assert node(provider, b"b") == file


def test_a_link_of_the_host_gets_a_further_name_itself(provider: HostDir, host: Path) -> None:
    (host / "link").symlink_to("nowhere")

    provider.link(node(provider, b"link"), ROOT, b"other")

    assert (host / "other").readlink() == Path("nowhere")
    directory = provider.mkdir(ROOT, b"d", 0o755).node
    fifo = provider.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o600).node
    assert failure(provider.link, directory, ROOT, b"x") == errno.EPERM
    assert failure(provider.link, fifo, ROOT, b"x") == errno.EPERM


def test_a_node_follows_what_the_guest_renames(provider: HostDir, host: Path) -> None:
    (host / "d" / "e").mkdir(parents=True)
    (host / "d" / "e" / "file").write_text("text")
    file = node(provider, b"d", b"e", b"file")

    provider.rename(ROOT, b"d", ROOT, b"moved", 0)

    assert provider.read(file, 0, 10) == b"text"
    assert provider.getattr(file)[0].st_ino == (host / "moved/e/file").stat().st_ino


def test_a_file_that_the_host_replaced_is_another_node(provider: HostDir, host: Path) -> None:
    (host / "file").write_text("old")
    old = node(provider, b"file")
    (host / "new").write_text("new")
    (host / "new").rename(host / "file")

    new = node(provider, b"file")

    assert new != old
    assert provider.read(new, 0, 10) == b"new"
    assert failure(provider.read, old, 0, 10) == errno.ESTALE
    assert failure(provider.getattr, old) == errno.ESTALE


def test_a_file_that_is_being_read_survives_its_replacement(provider: HostDir, host: Path) -> None:
    (host / "file").write_text("old")
    old = node(provider, b"file")
    assert provider.read(old, 0, 1) == b"o"
    (host / "new").write_text("new")
    (host / "new").rename(host / "file")

    assert provider.read(old, 0, 10) == b"old"


def test_a_file_without_write_permission_is_written_by_its_creator(
    provider: HostDir, host: Path
) -> None:
    file = provider.create(ROOT, b"object", 0o444, os.O_EXCL).node
    assert put(provider, file, b"content") == 7
    assert stat.S_IMODE((host / "object").stat().st_mode) == 0o444


def test_who_has_a_file_open_goes_on_when_its_mode_changes(
    provider: HostDir, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk of the guest's own; nobody here knows whether it has it open."""
    for name in ("read-only", "write-only", "orphan"):
        (host / name).write_text("text")
    read_only, write_only, orphan = (
        node(provider, name) for name in (b"read-only", b"write-only", b"orphan")
    )
    with as_an_ordinary_user():
        provider.unlink(ROOT, b"orphan")
        provider.setattr(read_only, mode(0o444))
        provider.setattr(write_only, mode(0o200))
        provider.setattr(orphan, mode(0))
        for file in (read_only, write_only, orphan):
            assert put(provider, file, b"more", 4) == 4
            assert provider.read(file, 0, 10) == b"textmore"
            assert provider.seek(file, 0, os.SEEK_HOLE) == 8
            provider.fsync(file, data_only=False)
        monkeypatch.setattr(hosttree, "WRITE_AGE_S", 0)
        provider.rest()
        assert put(provider, read_only, b"!", 8) == 1


def test_what_can_only_be_written_can_be_synced(provider: HostDir, host: Path) -> None:
    (host / "file").touch(0o200)
    file = node(provider, b"file")
    with as_an_ordinary_user():
        provider.fsync(file, data_only=True)
        assert failure(provider.read, file, 0, 1) == errno.EACCES


def test_a_umask_that_changes_does_not_narrow_what_the_guest_asked_for(
    provider: HostDir, host: Path
) -> None:
    """The guest's kernel has applied the guest's own."""
    before = os.umask(0o077)
    try:
        file = provider.create(ROOT, b"file", 0o644, 0)
        directory = provider.mkdir(ROOT, b"directory", 0o755)
    finally:
        os.umask(before)

    modes = [stat.S_IMODE((host / name).stat().st_mode) for name in ("file", "directory")]
    assert modes == [0o644, 0o755]
    assert stat.S_IMODE(file.attr.st_mode) == 0o644
    assert stat.S_IMODE(directory.attr.st_mode) == 0o755
    assert stat.S_IMODE(provider.getattr(directory.node)[0].st_mode) == 0o755


def test_creating_what_exists_opens_it(provider: HostDir, host: Path) -> None:
    (host / "file").write_text("text")

    assert failure(provider.create, ROOT, b"file", 0o600, os.O_EXCL) == errno.EEXIST
    assert provider.create(ROOT, b"file", 0o600, 0).attr.st_size == 4
    assert provider.create(ROOT, b"file", 0o600, os.O_TRUNC).attr.st_size == 0
    (host / "directory").mkdir()
    assert failure(provider.create, ROOT, b"directory", 0o600, 0) == errno.ESTALE


def test_the_descriptors_of_a_forgotten_node_are_closed(provider: HostDir, host: Path) -> None:
    before = open_descriptors(host)
    for number in range(20):
        entry = provider.create(ROOT, b"file%d" % number, 0o600, 0)
        provider.unlink(ROOT, b"file%d" % number)
        provider.forget(entry.node, 1)
    assert open_descriptors(host) == before


def test_a_deep_tree_needs_no_deep_descriptors(host: Path) -> None:
    provider = HostDir(host)
    for held in (provider._tree._directories, provider._tree._contents):
        held._account = Account(lambda: 0)  # as if other sandboxes had taken all that there is
    at = ROOT
    before = open_descriptors(host)
    for _ in range(200):
        at = provider.mkdir(at, b"d", 0o755).node
    provider.create(at, b"leaf", 0o644, 0)

    assert sorted(listed(provider, at)) == [b".", b"..", b"leaf"]
    assert open_descriptors(host) - before <= 2 * LEAST
    provider.close()
    assert open_descriptors(host) == 0


def test_what_is_too_deep_for_a_path_stays_usable(
    provider: HostDir, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PATH_MAX is 4096 bytes; a guest that goes down step by step makes longer ones."""
    monkeypatch.setattr(hosttree, "WALK_AGE_S", 0)  # as if each request came a second later
    at = ROOT
    for _ in range(25):
        at = provider.mkdir(at, b"d" * 250, 0o755).node
    file = provider.create(at, b"file", 0o444, 0).node
    open_file, empty = provider.create(at, b"open", 0o600, 0).node, provider.mkdir(at, b"e", 0o755)
    for one in (file, open_file):
        put(provider, one, b"text")
    provider.rest()
    provider.unlink(at, b"open")
    provider.rmdir(at, b"e")

    for _ in range(2):
        assert put(provider, file, b"more", 4) == 4
        assert provider.read(file, 0, 10) == b"textmore"
        assert provider.getattr(file)[0].st_size == 8
        assert provider.read(open_file, 0, 10) == b"text"
        assert provider.getattr(empty.node)[0].st_nlink == 0

    (host / ("d" * 250)).rename(host.parent / "outside")
    assert failure(provider.read, file, 0, 10) == errno.ESTALE
    assert failure(put, provider, file, b"text") == errno.ESTALE


def open_descriptors(below: Path) -> int:
    """How many of this process lead there: others come and go with what earlier tests have left."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(path.readlink())
    return sum(link.is_relative_to(below) for link in links)


def test_the_parent_of_the_root_is_not_told(provider: HostDir, host: Path) -> None:
    inodes = {entry.name: entry.ino for entry in provider.readdir(ROOT, 0, 1024)}
    assert inodes == {b".": host.stat().st_ino, b"..": host.stat().st_ino}


def test_a_listing_that_is_resumed_misses_nothing_while_names_come_and_go(
    provider: HostDir, host: Path
) -> None:
    for number in range(400):
        (host / f"{number:04}").touch()
    provider.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o600)
    seen: list[bytes] = []
    offset, step = 0, 0
    while batch := provider.readdir(ROOT, offset, 256):
        # Any entry may be the last that had room in the reply.
        seen.append(batch[0].name)
        offset = batch[0].offset
        step += 1
        (host / f"new{step}").touch()
        (host / f"new{step}").unlink()

    assert set(seen) >= {b"%04d" % number for number in range(400)} | {b"fifo"}
    assert len([name for name in seen if not name.startswith(b"new")]) == 403


def test_the_host_that_moves_directories_into_each_other_makes_no_circle(
    provider: HostDir, host: Path
) -> None:
    (host / "a" / "b").mkdir(parents=True)
    inner = node(provider, b"a", b"b")
    assert listed(provider, inner) == [b".", b".."]
    (host / "a" / "b").rename(host / "b")
    (host / "a").rename(host / "b" / "a")
    outer = provider.lookup(inner, b"a").node
    provider._tree._directories.close()  # as after a second

    assert failure(provider.lookup, outer, b"x") == errno.ESTALE


def test_errors_of_the_host_pass_through(provider: HostDir, host: Path) -> None:
    (host / "d" / "e").mkdir(parents=True)
    (host / "file").touch()
    file = node(provider, b"file")

    assert failure(provider.lookup, ROOT, b"none") == errno.ENOENT
    assert failure(provider.lookup, ROOT, b"x" * 300) == errno.ENAMETOOLONG
    assert failure(provider.rmdir, ROOT, b"d") == errno.ENOTEMPTY
    assert failure(provider.rmdir, ROOT, b"file") == errno.ENOTDIR
    assert failure(provider.mkdir, ROOT, b"d", 0o755) == errno.EEXIST
    assert failure(provider.rename, ROOT, b"file", ROOT, b"d", 0) == errno.EISDIR
    assert failure(provider.rename, ROOT, b"file", ROOT, b"x", 4) == errno.EINVAL
    assert failure(provider.getxattr, file, b"user.none") == errno.ENODATA
    assert failure(provider.seek, file, 0, os.SEEK_DATA) == errno.ENXIO
    assert failure(provider.seek, file, 0, os.SEEK_SET) == errno.EINVAL


def test_a_full_limit_of_the_process_is_the_guests_errno(
    provider: HostDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLIMIT_FSIZE stands for a full disk: the errno is the kernel's, and what was there stays."""
    file = provider.create(ROOT, b"file", 0o600, 0).node
    put(provider, file, b"kept")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        assert failure(put, provider, file, b"x", 8192) == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert provider.read(file, 0, 10) == b"kept"


def test_contents_can_be_copied_inside_the_host(provider: HostDir, host: Path) -> None:
    (host / "a").write_bytes(b"0123456789" * 1000)
    (host / "b").touch()
    a, b = node(provider, b"a"), node(provider, b"b")

    copied = provider.copy_range(a, 5, b, 3, 1000)

    assert (host / "b").read_bytes() == b"\0\0\0" + (b"0123456789" * 1000)[5 : 5 + copied]
    assert copied > 0


def test_syncing_reaches_files_and_directories(provider: HostDir, host: Path) -> None:
    file = provider.create(ROOT, b"file", 0o600, 0).node
    provider.fsync(file, data_only=True)
    provider.fsync(ROOT, data_only=False)
    (host / "read-only").write_text("x")
    provider.fsync(node(provider, b"read-only"), data_only=False)


def test_the_time_of_a_link_can_change_without_losing_it(provider: HostDir, host: Path) -> None:
    link = provider.symlink(ROOT, b"link", b"target").node
    provider.setattr(link, SetAttr(SetAttrField.MTIME, 0, 0, 42, 0, 0, 0))
    assert (host / "link").lstat().st_mtime_ns == 42
    assert provider.readlink(link) == b"target"
    assert node(provider, b"link") == link


def test_specials_behave_like_files_of_the_directory(provider: HostDir, host: Path) -> None:
    fifo = provider.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o4600)
    assert fifo.attr.st_mode == stat.S_IFIFO | 0o600
    assert failure(provider.mknod, ROOT, b"fifo", stat.S_IFSOCK) == errno.EEXIST
    (host / "file").touch()
    assert failure(provider.mknod, ROOT, b"file", stat.S_IFSOCK) == errno.EEXIST

    provider.setattr(fifo.node, SetAttr(SetAttrField.MODE, 0, 0, 0, 0o6640, 0, 0))
    assert provider.getattr(fifo.node)[0].st_mode == stat.S_IFIFO | 0o640
    assert failure(provider.setattr, fifo.node, truncated(0)) == errno.EINVAL
    assert failure(provider.read, fifo.node, 0, 1) == errno.EINVAL
    assert failure(provider.rename, ROOT, b"fifo", ROOT, b"file", 1) == errno.EEXIST
    assert failure(provider.rename, ROOT, b"fifo", ROOT, b"file", 2) == errno.EINVAL
    provider.rename(ROOT, b"fifo", ROOT, b"fifo", 0)
    provider.rename(ROOT, b"fifo", ROOT, b"file", 0)
    assert node(provider, b"file") == fifo.node
    assert list(host.iterdir()) == []

    provider.unlink(ROOT, b"file")
    assert provider.getattr(fifo.node)[0].st_nlink == 0
    assert failure(provider.lookup, ROOT, b"file") == errno.ENOENT
    provider.forget(fifo.node, 100)
    assert failure(provider.getattr, fifo.node) == errno.ESTALE


def test_a_directory_with_fifos_is_not_empty_for_the_guest(provider: HostDir, host: Path) -> None:
    full, other = (provider.mkdir(ROOT, name, 0o755).node for name in (b"full", b"other"))
    provider.mknod(full, b"fifo", stat.S_IFIFO | 0o600)

    assert failure(provider.rmdir, ROOT, b"full") == errno.ENOTEMPTY
    assert failure(provider.rename, ROOT, b"other", ROOT, b"full", 0) == errno.ENOTEMPTY
    provider.rename(ROOT, b"full", ROOT, b"other", 0)

    assert listed(provider, full) == [b".", b"..", b"fifo"]
    assert provider.getattr(other)[0].st_nlink == 0


def test_fifos_of_directories_that_the_host_removed_take_no_room(
    provider: HostDir, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specials, "MAX_SPECIALS", 3)
    kept, gone = (provider.mkdir(ROOT, name, 0o755).node for name in (b"kept", b"gone"))
    fifo = stat.S_IFIFO | 0o600
    in_use = provider.mknod(gone, b"in use", fifo).node
    provider.forget(provider.mknod(gone, b"forgotten", fifo).node, 1)
    provider.mknod(kept, b"fifo", fifo)
    assert failure(provider.mknod, kept, b"more", fifo) == errno.ENOSPC
    (host / "gone").rmdir()
    provider._tree._directories.close()  # as after a second

    provider.mknod(kept, b"more", fifo)

    assert failure(provider.mknod, kept, b"too many", fifo) == errno.ENOSPC
    assert provider.getattr(in_use)[0].st_nlink == 0
    assert sorted(listed(provider, kept)) == [b".", b"..", b"fifo", b"more"]
    provider.forget(in_use, 1)
    provider.mknod(kept, b"once more", fifo)


STEPS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 3)), max_size=40)


@given(STEPS)
@settings(max_examples=60)
def test_any_sequence_of_operations_leaves_what_the_host_shows(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, int]]
) -> None:
    """The host's own file system is the model: each name the provider knows is what the host has there."""
    host = tmp_path_factory.mktemp("model")
    provider = HostDir(host)
    for action, first, second in steps:
        a, b = b"n%d" % first, b"n%d" % second
        operations: list[Callable[[], object]] = [
            lambda a=a: put(provider, provider.create(ROOT, a, 0o600, 0).node, a),
            lambda a=a: provider.unlink(ROOT, a),
            lambda a=a, b=b: provider.rename(ROOT, a, ROOT, b, 0),
            lambda a=a, b=b: provider.link(node(provider, a), ROOT, b),
            lambda a=a, b=b: provider.rename(ROOT, a, ROOT, b, 2),
            lambda a=a: (host / os.fsdecode(a)).unlink(),
            lambda a=a, b=b: (host / os.fsdecode(a)).rename(host / os.fsdecode(b)),
        ]
        try:
            operations[action]()
        except OSError as error:
            assert error.errno in (errno.ENOENT, errno.EEXIST, errno.ESTALE)  # noqa: PT017
    left = sorted(os.fsencode(entry.name) for entry in host.iterdir())
    assert sorted(listed(provider, ROOT))[2:] == left
    for entry in host.iterdir():
        file = node(provider, os.fsencode(entry.name))
        assert provider.getattr(file)[0].st_ino == entry.stat().st_ino
        assert provider.read(file, 0, 10) == entry.read_bytes()
    provider.close()
