"""What overlayfs holds on to does not vanish beneath it (taskvm.fs.lower): nodes are names."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.waiting import eventually

from taskvm.fs.hostdir import HostDir
from taskvm.fs.lower import Lower
from taskvm.fs.provider import ROOT, Absent, Change, Provider


@pytest.fixture
def lower(host: Path) -> Iterator[Provider]:
    (host / "a").mkdir()
    (host / "a" / "file").write_text("first")
    (host / "note").write_text("first")
    provider = HostDir(host, mode="review").opened()
    yield provider
    provider.close()


def save(path: Path, text: str) -> None:
    """As an editor does: another file takes the name."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def test_a_mount_for_review_is_such_a_layer(lower: Provider) -> None:
    assert isinstance(lower, Lower)
    assert lower.readonly


def test_a_name_with_another_file_is_the_same_node_with_the_new_content(
    lower: Provider, host: Path
) -> None:
    told: list[Change] = []
    lower.changes = told.append
    node = lower.lookup(ROOT, b"note").node
    assert lower.read(node, 0, 100) == b"first"

    save(host / "note", "second, longer")
    entry = lower.lookup(ROOT, b"note")

    assert entry.node == node
    assert entry.attr.st_size == 14
    assert lower.read(node, 0, 100) == b"second, longer"
    assert Change(node) in told


def test_a_removed_name_stays_with_its_attributes_and_may_come_back(
    lower: Provider, host: Path
) -> None:
    directory = lower.lookup(ROOT, b"a").node
    file = lower.lookup(directory, b"file").node
    shutil.rmtree(host / "a")

    gone, below = lower.lookup(ROOT, b"a"), lower.lookup(directory, b"file")

    assert (gone.node, below.node) == (directory, file)
    assert stat.S_ISDIR(gone.attr.st_mode)
    assert below.attr.st_size == 5
    assert gone.lifetime.entry_ns == below.lifetime.entry_ns == 0
    assert lower.readdir(directory, 0, 4096) == []
    assert lower.getattr(file)[0].st_size == 5
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is compared
        lower.lookup(directory, b"never seen")
    assert caught.value.errno == errno.ENOENT
    (host / "a").mkdir()
    (host / "a" / "file").write_text("back again")
    assert lower.lookup(ROOT, b"a").node == directory
    assert lower.lookup(directory, b"file").node == file
    assert lower.read(file, 0, 100) == b"back again"


def test_a_name_that_was_never_seen_is_absent(lower: Provider) -> None:
    with pytest.raises(Absent):
        lower.lookup(ROOT, b"missing")


def test_what_is_forgotten_is_looked_up_afresh(lower: Provider, host: Path) -> None:
    entry = lower.lookup(ROOT, b"note")
    lower.lookup(ROOT, b"note")
    lower.forget(entry.node, 2)
    (host / "note").unlink()

    with pytest.raises(FileNotFoundError):
        lower.lookup(ROOT, b"note")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is compared
        lower.getattr(entry.node)
    assert caught.value.errno == errno.ESTALE


@pytest.mark.parametrize("name", [b"a", b"link"])
def test_another_type_and_another_link_are_other_nodes(
    lower: Provider, host: Path, name: bytes
) -> None:
    """The guest's kernel keeps the type of a node, and what it read of a link, for good."""
    (host / "link").symlink_to("note")
    node = lower.lookup(ROOT, name).node
    path = host / os.fsdecode(name)
    shutil.rmtree(path) if name == b"a" else path.unlink()
    path.symlink_to("elsewhere")

    entry = lower.lookup(ROOT, name)

    assert entry.node != node
    assert lower.readlink(entry.node) == b"elsewhere"


def test_the_inner_provider_keeps_one_reference_for_each_name(lower: Provider, host: Path) -> None:
    """However often a name is looked up, and whatever it stood for meanwhile, all is given back."""
    assert isinstance(lower, Lower)
    node = lower.lookup(ROOT, b"note").node
    for number in range(5):
        save(host / "note", str(number))
        assert lower.lookup(ROOT, b"note").node == node
    lower.forget(node, 6)

    assert len(lower._inner._nodes) == 1  # type: ignore[attr-defined]  # a HostDir's
    assert len(lower._by_inner) == 1


def test_another_process_serves_the_mount_on(lower: Provider, host: Path) -> None:
    """A saved guest finds its nodes: those that are there, those that changed, and those that are gone."""
    directory = lower.lookup(ROOT, b"a").node
    file = lower.lookup(directory, b"file").node
    note = lower.lookup(ROOT, b"note").node
    lower.rest()
    state = lower.export_state()
    lower.close()
    shutil.rmtree(host / "a")
    save(host / "note", "saved meanwhile")

    again = HostDir(host, mode="review").opened()
    told: list[Change] = []
    again.changes = told.append
    again.import_state(state)

    assert again.lookup(ROOT, b"a").node == directory
    assert again.getattr(file)[0].st_size == 5
    assert again.lookup(ROOT, b"note").node == note
    assert again.read(note, 0, 100) == b"saved meanwhile"
    assert {change.node for change in told} >= {note, directory}
    (host / "new").touch()
    assert again.lookup(ROOT, b"new").node > note
    again.close()


def test_a_kernel_reads_through_it_what_the_host_saves_and_removes(
    mount_of: Callable[[Provider], Path], host: Path
) -> None:
    """What is held on to stays, under its name too, as overlayfs needs it."""
    (host / "a").mkdir()
    (host / "a" / "file").write_text("first")
    mounted = mount_of(HostDir(host, mode="review"))
    held = [os.open(mounted / path, os.O_PATH) for path in ("a", "a/file")]
    assert (mounted / "a" / "file").read_text() == "first"

    save(host / "a" / "file", "second")
    assert eventually(lambda: (mounted / "a" / "file").read_text() == "second")
    shutil.rmtree(host / "a")
    time.sleep(0.2)

    assert (mounted / "a").is_dir()
    assert (mounted / "a" / "file").stat().st_size == 6
    for descriptor in held:
        os.close(descriptor)
