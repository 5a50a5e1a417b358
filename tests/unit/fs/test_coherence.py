"""What a guest remembers of a directory of the host stays true: taskvm.fs.coherence, under this host's kernel.

Beneath it lie taskvm.fs.inotify and taskvm.fs.hosttree.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.kernel_mount import KernelMount
from tests.support.waiting import PATIENCE_S, eventually

from taskvm.fs import coherence as coherence_module
from taskvm.fs import hosttree
from taskvm.fs.descriptors import KEPT
from taskvm.fs.hostdir import HostDir
from taskvm.fs.inotify import OVERFLOW, Event
from taskvm.fs.provider import ROOT, Change, Provider
from taskvm.wire.fuse_replies import Lifetime

Mount = Callable[[Provider], KernelMount]


def seen(root: Path) -> dict[str, object]:
    """Return all that a program can learn of a tree."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        is_link = path.is_symlink()
        status = path.lstat()
        found[str(path.relative_to(root))] = (
            status.st_mode,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            path.readlink() if is_link else path.read_bytes() if path.is_file() else None,
        )
    return found


def populate(host: Path) -> None:
    (host / "deep" / "er").mkdir(parents=True)
    (host / "file").write_bytes(b"one" * 1000)
    (host / "deep" / "er" / "leaf").write_text("leaf")
    (host / "deep" / "link").symlink_to("er/leaf")


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("more")


def write_mapped(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:3] = b"MAP"


def replace(path: Path) -> None:
    (path.parent / "new").write_text("replaced")
    (path.parent / "new").rename(path)


def remake_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


CHANGES: dict[str, Callable[[Path], object]] = {
    "written": lambda host: (host / "file").write_bytes(b"two" * 1000),
    "appended": lambda host: append(host / "file"),
    "cut": lambda host: os.truncate(host / "file", 5),
    "mapped": lambda host: write_mapped(host / "file"),
    "replaced": lambda host: replace(host / "file"),
    "chmod": lambda host: (host / "file").chmod(0o600),
    "touched": lambda host: os.utime(host / "file", ns=(1, 2)),
    "created": lambda host: (host / "deep" / "new").write_text("new"),
    "removed": lambda host: (host / "deep" / "er" / "leaf").unlink(),
    "renamed": lambda host: (host / "file").rename(host / "deep" / "file"),
    "link": lambda host: remake_link(host / "deep" / "link"),
    "directory": lambda host: (host / "deep" / "er").rename(host / "er"),
    "tree": lambda host: shutil.rmtree(host / "deep"),
    "chmod of a directory": lambda host: (host / "deep").chmod(0o700),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_by_the_host_shows(
    kernel_mount: Mount, host: Path, change: Callable[[Path], object]
) -> None:
    """Although the guest may believe for an hour what it has seen."""
    populate(host)
    mount = kernel_mount(HostDir(host))
    assert seen(mount.path) == seen(host)
    time.sleep(0.03)  # a second change within a tick of the host's clock is another test

    change(host)

    assert eventually(lambda: seen(mount.path) == seen(host)), (seen(mount.path), seen(host))


# A program of its own: one that waits for a page of a mapping lets no other thread of it run, not the server's either.
READER = """
import mmap, os, sys, time
path, host, own = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
seen = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
assert not any(seen[:])
if own == "written":
    os.pwrite(fd, b"own", 0)
elif own == "mapped":
    mmap.mmap(fd, 0)[:3] = b"own"
    os.fsync(fd)
elif own == "chmod":
    os.chmod(path, 0o640)
elif own == "attribute":
    os.setxattr(path, "user.own", b"1")
elif own == "renamed":
    os.rename(path, path + "2")
    os.rename(path + "2", path)
for word in b"one", b"two", b"three":
    with open(host, "r+b") as changed:
        os.pwrite(changed.fileno(), word, 10_000)
    for read in (lambda: os.pread(fd, len(word), 10_000)), (lambda: seen[10_000 : 10_000 + len(word)]):
        while read() != word:
            time.sleep(0.01)
    print(word.decode(), flush=True)
"""


@pytest.mark.parametrize("own", ["written", "mapped", "chmod", "attribute", "renamed", "nothing"])
def test_who_has_a_file_open_or_mapped_sees_what_the_host_writes(
    kernel_mount: Mount, host: Path, own: str
) -> None:
    """Again and again, after a change of the guest's own, and without asking for attributes: those it may believe."""
    (host / "file").write_bytes(bytes(20_000))
    mount = kernel_mount(HostDir(host))

    read = subprocess.run(
        [sys.executable, "-c", READER, mount.path / "file", host / "file", own],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )

    assert read.stdout.split() == ["one", "two", "three"]


def test_what_lasts_is_not_asked_again(kernel_mount: Mount, host: Path) -> None:
    """After more than the second that a guest may believe without watches: names, absent names, listings."""
    populate(host)
    mount = kernel_mount(HostDir(host))
    for _ in range(
        2
    ):  # a directory that was told before anybody looked into it is asked for once more
        seen(mount.path)
        assert not (mount.path / "deep" / "absent").exists()
        time.sleep(1.1)
    mount.requests.clear()

    seen(mount.path)
    assert not (mount.path / "deep" / "absent").exists()

    # The kernel takes each file's atime for stale after the READ; open() of Python asks whether it has a terminal.
    assert set(mount.requests) <= {"GETATTR", "IOCTL"}
    assert mount.told == 0


def test_an_absent_name_that_the_host_makes_shows(kernel_mount: Mount, host: Path) -> None:
    """The guest was told that it may believe the absence."""
    mount = kernel_mount(HostDir(host))
    assert not (mount.path / "name").exists()

    (host / "name").touch()

    assert eventually((mount.path / "name").exists)


def test_the_guests_own_changes_are_not_told_to_it(kernel_mount: Mount, host: Path) -> None:
    """Not one message for any kind of change, and the guest sees what it did."""
    populate(host)
    mount = kernel_mount(HostDir(host))
    guest = mount.path
    seen(guest)

    for number in range(20):
        (guest / f"made{number}").write_text("x" * number)
        (guest / f"made{number}").chmod(0o640)
        os.utime(guest / f"made{number}", ns=(number, number))
    (guest / "made1").rename(guest / "deep" / "moved")
    (guest / "made2").rename(guest / "made3")
    os.link(guest / "made4", guest / "hard")
    (guest / "made6").unlink()
    append(guest / "made7")
    os.truncate(guest / "made8", 3)
    os.setxattr(guest / "made9", "user.a", b"b")
    (guest / "sub").mkdir()
    (guest / "sub" / "link").symlink_to("x")
    shutil.rmtree(guest / "sub")
    view = seen(guest)

    assert view == seen(host)
    assert mount.told == 0


def test_a_file_written_many_times_costs_one_message(kernel_mount: Mount, host: Path) -> None:
    """What the guest no longer believes is not told again."""
    (host / "file").write_bytes(b"x")
    mount = kernel_mount(HostDir(host))
    (mount.path / "file").read_bytes()
    time.sleep(1.1)  # what was told longer ago needs no message for its name

    with (host / "file").open("ab", buffering=0) as file:
        for _ in range(1000):
            file.write(b"y")

    assert eventually(lambda: (mount.path / "file").stat().st_size == 1001)
    assert mount.told < 100


def test_one_guest_sees_what_another_does(kernel_mount: Mount, host: Path) -> None:
    """The other one is a host to it."""
    populate(host)
    first, second = kernel_mount(HostDir(host)), kernel_mount(HostDir(host))
    assert seen(first.path) == seen(second.path)
    time.sleep(0.03)

    (first.path / "file").write_text("by the first")
    (first.path / "deep" / "er" / "leaf").unlink()

    assert eventually(lambda: seen(second.path) == seen(first.path) == seen(host))


def test_a_log_that_the_host_rotates_is_followed(kernel_mount: Mount, host: Path) -> None:
    """By who has it open: no event tells of its new name, which the guest does not know."""
    (host / "log").write_bytes(b"one")
    mount = kernel_mount(HostDir(host))
    log = os.open(mount.path / "log", os.O_RDONLY)
    assert os.read(log, 99) == b"one"
    assert (
        os.fstat(log).st_size == 3
    )  # not before: a read makes the kernel ask for the attributes once more

    (host / "log").rename(host / "log.1")
    append(host / "log.1")

    assert eventually(lambda: os.read(log, 99) == b"more")
    os.close(log)


def test_a_name_that_turned_out_to_be_wrong_is_told(kernel_mount: Mount, host: Path) -> None:
    """By a use of another name, which may come before the event."""
    (host / "a").write_bytes(b"text")
    os.link(host / "a", host / "b")
    mount = kernel_mount(HostDir(host))
    assert (mount.path / "a").stat().st_nlink == (mount.path / "b").stat().st_nlink == 2
    with (mount.path / "a").open("rb", buffering=0) as file:
        (host / "b").unlink()

        assert file.read() == b"text"

        assert eventually(lambda: not (mount.path / "b").exists())


def test_lost_events_make_everything_doubtful(
    kernel_mount: Mount, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """inotify says that its queue ran over, and nothing of what happened."""
    populate(host)
    mount = kernel_mount(HostDir(host))
    seen(mount.path)
    assert not (mount.path / "absent").exists()
    lost = [Event(-1, OVERFLOW, b"")]
    real = coherence_module.Inotify.read
    monkeypatch.setattr(coherence_module.Inotify, "read", lambda self: real(self) and list(lost))

    (host / "file").write_bytes(b"new")
    (host / "absent").touch()
    shutil.rmtree(host / "deep")

    assert eventually(lambda: seen(mount.path) == seen(host))


@pytest.mark.parametrize("watches", [True, False])
def test_what_is_doubtful_is_told_a_part_at_a_time(
    host: Path, monkeypatch: pytest.MonkeyPatch, *, watches: bool
) -> None:
    """A guest may know a million names, and its requests are to be answered meanwhile."""
    monkeypatch.setattr(coherence_module, "DOUBTS_AT_ONCE", 4)
    told: list[Change] = []
    provider = HostDir(host).opened()
    provider.changes = told.append
    names = [f"{number}" for number in range(10)]
    for name in names:
        (host / name).touch()
    nodes = [provider.lookup(ROOT, name.encode()).node for name in names]
    (source,) = provider.sources()
    reads = [[Event(-1, OVERFLOW, b"")], [Event(-1, OVERFLOW, b"")]]
    real = coherence_module.Inotify.read
    monkeypatch.setattr(
        coherence_module.Inotify,
        "read",
        lambda self: [*real(self), *(reads.pop() if reads else [])],
    )
    if not watches:
        monkeypatch.setattr(coherence_module.Inotify, "poke", _no_more_watches)

    batches = []
    (host / "new").touch()
    while select.select([source.fd], [], [], 0)[0]:
        told.clear()
        source.ready()
        batches.append(list(told))

    everything = {*map(Change, (ROOT, *nodes)), *(Change(ROOT, name.encode()) for name in names)}
    assert everything <= {change for batch in batches for change in batch}
    if watches:
        assert max(map(len, batches)) <= 10
        assert sum(batch.count(Change(nodes[5])) for batch in batches) == 2
    provider.close()


def _no_more_watches(self: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("reason", ["limit", "filesystem", "instances"])
def test_without_a_watch_nothing_lasts(
    host: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """Beyond the limit, on a file system that others change, or when this user may have no more."""
    populate(host)

    def none(self: object) -> None:
        raise OSError(24, "Too many open files")

    if reason == "limit":
        monkeypatch.setattr(coherence_module, "_budget", lambda: 1)
    elif reason == "filesystem":
        monkeypatch.setattr(coherence_module, "LOCAL", frozenset())
    else:
        monkeypatch.setattr(coherence_module.Inotify, "__init__", none)
    provider = HostDir(host).opened()
    deep = provider.lookup(ROOT, b"deep")

    leaf = provider.lookup(deep.node, b"link")

    short = Lifetime(entry_ns=1_000_000_000, attr_ns=1_000_000_000)
    assert leaf.lifetime == short
    assert deep.lifetime.attr_ns == short.attr_ns
    with pytest.raises(FileNotFoundError) as caught:
        provider.lookup(deep.node, b"absent")
    assert getattr(caught.value, "lifetime_ns", None) == 0
    provider.close()


def test_a_file_with_two_names_is_believed_for_a_second(host: Path) -> None:
    """A change through the other name, which may be anywhere, causes no event here."""
    populate(host)
    os.link(host / "file", host.parent / "outside")
    provider = HostDir(host).opened()

    entry = provider.lookup(ROOT, b"file")

    assert entry.lifetime.attr_ns == 1_000_000_000 < entry.lifetime.entry_ns
    provider.close()


def test_the_host_remembers_a_bounded_number_of_absent_names(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that asks for ever is answered, and believed to remember no more than that."""
    monkeypatch.setattr(coherence_module, "MAX_ABSENT_IN_DIRECTORY", 10)
    provider = HostDir(host).opened()
    lifetimes = []
    for number in range(20):
        with pytest.raises(FileNotFoundError) as caught:
            provider.lookup(ROOT, b"%d" % number)
        lifetimes.append(getattr(caught.value, "lifetime_ns", None))

    assert [bool(lifetime) for lifetime in lifetimes] == [True] * 10 + [False] * 10
    provider.close()


def test_a_directory_that_the_guest_forgets_is_watched_no_longer(host: Path) -> None:
    """Events of it are nobody's business then."""
    populate(host)
    told: list[Change] = []
    provider = HostDir(host).opened()
    provider.changes = told.append
    deep = provider.lookup(ROOT, b"deep").node
    provider.lookup(deep, b"er")
    provider.forget(provider.lookup(deep, b"er").node, 2)
    provider.forget(deep, 1)
    (source,) = provider.sources()

    (host / "deep" / "new").touch()
    source.ready()

    assert told == []
    provider.close()


def test_what_the_host_stores_twice_through_a_mapping_shows_when_it_closes(
    kernel_mount: Mount, host: Path
) -> None:
    """The second store finds the page dirty, so that no time changes."""
    (host / "file").write_bytes(bytes(100))
    mount = kernel_mount(HostDir(host))
    with (host / "file").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:3] = b"one"
        assert eventually(lambda: (mount.path / "file").read_bytes()[:3] == b"one")
        time.sleep(0.03)  # longer than a tick of the host's clock
        assert (mount.path / "file").read_bytes()[:3] == b"one"
        mapped[:3] = b"two"

    assert eventually(lambda: (mount.path / "file").read_bytes()[:3] == b"two")


@pytest.mark.parametrize("why", ["rest", "room"])
def test_what_this_server_closes_is_not_told(
    host: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """And what others close after writing is, as nobody knows what they wrote."""
    if why == "room":
        monkeypatch.setattr(KEPT, "_limit", lambda: 0)
    told: list[Change] = []
    provider = HostDir(host).opened()
    provider.changes = told.append
    assert provider.readdir(ROOT, 0, 1024)  # from here on it is watched
    nodes = [provider.create(ROOT, b"%d" % number, 0o600, 0).node for number in range(40)]
    for node in nodes:
        provider.write(node, 0, memoryview(b"text"), append=False)
        provider.getattr(node)
    if why == "rest":
        monkeypatch.setattr(hosttree, "WRITE_AGE_S", 0)
        provider.rest()
    (source,) = provider.sources()

    source.ready()
    assert told == []
    time.sleep(0.03)  # longer than a tick of the host's clock
    with (host / "0").open("r+b"):
        pass
    source.ready()

    assert Change(nodes[0]) in told
    provider.close()


def test_a_number_that_is_used_again_is_another_node(host: Path) -> None:
    """ext4 gives a new file the inode number of one that was just removed."""
    provider = HostDir(host).opened()
    nodes, numbers = set(), set()
    for _ in range(8):
        (host / "file").touch()
        entry = provider.lookup(ROOT, b"file")
        nodes.add(entry.node)
        numbers.add(entry.attr.st_ino)
        (host / "file").unlink()

    assert len(nodes) == 8
    provider.close()


def test_the_host_can_run_what_the_guest_built(kernel_mount: Mount, host: Path) -> None:
    """No descriptor stays open for writing, also when the guest is never quiet: that would be ETXTBSY."""
    mount = kernel_mount(HostDir(host))
    shutil.copy("/bin/true", mount.path / "program")

    def runs() -> bool:
        (mount.path / "poll").write_text("still there?")
        try:
            return subprocess.run([host / "program"], check=False).returncode == 0
        except OSError:
            return False

    assert eventually(runs)


def test_a_saved_guest_goes_on_with_another_server(kernel_mount: Mount, host: Path) -> None:
    """Open files work on, what changed while it slept shows, and what is gone is gone."""
    populate(host)
    (host / "kept").write_text("kept")
    (host / "lost").write_text("lost")
    mount = kernel_mount(HostDir(host))
    before = seen(mount.path)
    assert not (mount.path / "absent").exists()
    os.mkfifo(mount.path / "fifo")
    kept, lost = (mount.path / "kept").open("r+"), (mount.path / "lost").open()

    state = mount.save()
    (host / "file").write_bytes(b"changed meanwhile")
    (host / "absent").write_text("there by now")
    (host / "lost").unlink()
    mount.take_up(HostDir(host), state)

    assert before.keys() == {"file", "kept", "lost", "deep", "deep/er", "deep/er/leaf", "deep/link"}
    assert eventually(lambda: (mount.path / "absent").exists())
    assert eventually(lambda: (mount.path / "file").read_bytes() == b"changed meanwhile")
    assert eventually(lambda: not (mount.path / "lost").exists())
    assert (mount.path / "fifo").is_fifo()
    kept.write("and written")
    kept.close()
    lost.close()
    assert (host / "kept").read_text() == "and written"
    (mount.path / "fifo").unlink()
    assert eventually(lambda: seen(mount.path) == seen(host)), (seen(mount.path), seen(host))


def test_a_state_of_another_directory_is_refused(host: Path, tmp_path: Path) -> None:
    """Node numbers would stand for other files."""
    other = tmp_path / "other"
    other.mkdir()
    state = HostDir(host).opened().export_state()

    with pytest.raises(ValueError, match="another directory"):
        HostDir(other).opened().import_state(state)
    with pytest.raises(ValueError, match="Expected `object`"):
        HostDir(host).opened().import_state(b"\x00")
