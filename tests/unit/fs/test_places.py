"""taskvm.fs.places: what a guest knows, and by which path (taskvm.fs.tracked keeps it, taskvm.fs.walk needs none)."""

from __future__ import annotations

import errno

import pytest

from taskvm.fs.memory import Memory
from taskvm.fs.places import Places
from taskvm.fs.provider import ROOT
from taskvm.fs.tracked import Tracked
from taskvm.fs.walk import walk


def test_a_place_lives_as_long_as_its_references_or_what_is_in_it() -> None:
    places = Places()
    directory = places.bind(places[ROOT], b"d", 2, directory=True)
    places.bind(directory, b"f", 3, directory=False)

    assert places.forget(2, 1) == []
    assert places[3].path == (b"d", b"f")
    assert {place.node for place in places.forget(3, 5)} == {2, 3}
    assert len(places) == 1


def test_every_reference_that_was_handed_out_is_given_back_at_once() -> None:
    places = Places()
    for _ in range(3):
        places.bind(places[ROOT], b"f", 2, directory=False)

    assert places.forget(2, 2) == []
    (gone,) = places.forget(2, 1)
    assert (gone.node, gone.handed) == (2, 3)


def test_paths_follow_moves_and_exchanges() -> None:
    places = Places()
    root = places[ROOT]
    a, b = (places.bind(root, name, node, directory=True) for name, node in ((b"a", 2), (b"b", 3)))
    inner = places.bind(a, b"inner", 4, directory=False)

    places.move(root, b"a", b, b"c")
    assert inner.path == (b"b", b"c", b"inner")
    places.exchange(root, b"b", b, b"c")
    assert b.names == [(b, b"c")]  # what no file system allows: it has no path, and nothing hangs
    with pytest.raises(OSError, match="ESTALE"):
        b.below(b"x")


def test_a_directory_has_one_name_and_a_file_may_have_more() -> None:
    places = Places()
    root = places[ROOT]
    for name in (b"x", b"y"):
        places.bind(root, name, 2, directory=True)
        places.bind(root, name * 2, 3, directory=False)

    assert [name for _parent, name in places[2].names] == [b"y"]
    assert [name for _parent, name in places[3].names] == [b"xx", b"yy"]


def test_what_is_unlinked_keeps_its_last_path_and_has_nothing_below() -> None:
    places = Places()
    directory = places.bind(places[ROOT], b"d", 2, directory=True)
    file = places.bind(directory, b"f", 3, directory=False)

    places.unbind(places[ROOT], b"d")

    assert directory.path == (b"d",)
    assert file.path == (b"d", b"f")
    with pytest.raises(OSError, match="ESTALE"):
        directory.below(b"f")


def test_a_tracked_provider_forgets_all_that_its_guest_forgot() -> None:
    memory = Memory()
    tracked = Tracked(memory)
    for number in range(20):
        directory = tracked.mkdir(ROOT, b"d%d" % number, 0o755).node
        file = tracked.create(directory, b"f", 0o644, 0).node
        tracked.unlink(directory, b"f")
        tracked.rmdir(ROOT, b"d%d" % number)
        tracked.forget(directory, 1)
        tracked.forget(file, 1)

    assert len(tracked.places) == 1
    assert memory._used == 0


def test_a_walk_finds_everything_and_keeps_nothing() -> None:
    memory = Memory()
    a = memory.mkdir(ROOT, b"a", 0o755).node
    memory.forget(memory.create(memory.mkdir(a, b"b", 0o755).node, b"f", 0o644, 0).node, 1)
    references = {number: inode.references for number, inode in memory._inodes.items()}

    found = {(each.path, each.directory) for each in walk(memory, ROOT)}
    next(walk(memory, ROOT))  # one that is not finished

    assert found == {((b"a",), True), ((b"a", b"b"), True), ((b"a", b"b", b"f"), False)}
    assert {number: inode.references for number, inode in memory._inodes.items()} == references


def test_an_unknown_node_is_stale() -> None:
    with pytest.raises(OSError, match="ESTALE") as caught:
        Places()[7]
    assert caught.value.errno == errno.ESTALE
