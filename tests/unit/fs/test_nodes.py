"""The table of nodes: references, places and identities."""

from __future__ import annotations

import errno
import stat
from types import SimpleNamespace

import pytest

from taskvm.fs import nodes as nodes_module
from taskvm.fs.nodes import NodeTable


def seen(
    ino: int, kind: int = stat.S_IFREG, mtime_ns: int = 0, birth_ns: int = 0, links: int = 2
) -> SimpleNamespace:
    return SimpleNamespace(
        st_dev=1,
        st_ino=ino,
        st_mode=kind | 0o644,
        st_nlink=links,
        st_mtime_ns=mtime_ns,
        st_birth_ns=birth_ns,
    )


@pytest.fixture
def table() -> NodeTable:
    return NodeTable(seen(1, stat.S_IFDIR))


def test_a_node_lives_as_long_as_its_references(table: NodeTable) -> None:
    node = table.bind(table.root, b"a", seen(5))
    table.bind(table.root, b"a", seen(5))

    assert table.forget(node.id, 1) is None
    assert table[node.id] is node
    assert table.forget(node.id, 1) is node
    with pytest.raises(OSError, match="ESTALE") as caught:
        table[node.id]
    assert caught.value.errno == errno.ESTALE
    assert table.root.children == {}
    assert len(table) == 1


def test_numbers_are_never_used_twice(table: NodeTable) -> None:
    first = table.bind(table.root, b"a", seen(5)).id
    table.forget(first, 1)
    assert table.bind(table.root, b"a", seen(5)).id != first


def test_the_root_is_never_forgotten(table: NodeTable) -> None:
    assert table.forget(1, 2**64 - 1) is None
    assert table[1] is table.root


def test_another_inode_under_the_name_is_another_node(table: NodeTable) -> None:
    old = table.bind(table.root, b"a", seen(5))
    new = table.bind(table.root, b"a", seen(6))
    assert (old.places, new.places) == ([], [(table.root, b"a")])


def test_a_directory_has_one_place_and_a_file_may_have_more(table: NodeTable) -> None:
    for kind, places in ((stat.S_IFDIR, 1), (stat.S_IFREG, 2)):
        node = table.bind(table.root, b"a%d" % kind, seen(kind, kind))
        table.bind(table.root, b"b%d" % kind, seen(kind, kind))
        assert len(node.places) == places


def test_what_is_seen_with_one_link_has_left_the_names_it_had(table: NodeTable) -> None:
    node = table.bind(table.root, b"a", seen(5))
    table.bind(table.root, b"b", seen(5))
    assert table.bind(table.root, b"a", seen(5, links=1)) is node

    assert node.places == [(table.root, b"a")]
    assert table.root.children == {b"a": node}
    assert table.left == [(table.root.id, b"b")]


def test_a_link_that_was_made_anew_is_another_node(table: NodeTable) -> None:
    old = table.bind(table.root, b"a", seen(5, stat.S_IFLNK, 1))
    assert table.bind(table.root, b"a", seen(5, stat.S_IFLNK, 2)) is not old


def test_moves_and_exchanges_keep_both_directions(table: NodeTable) -> None:
    a, b = table.bind(table.root, b"a", seen(5)), table.bind(table.root, b"b", seen(6))

    table.exchange(table.root, b"a", table.root, b"b")
    assert (a.places, b.places) == ([(table.root, b"b")], [(table.root, b"a")])
    table.move(table.root, b"a", table.root, b"b")
    assert (a.places, b.places) == ([], [(table.root, b"b")])
    assert table.root.children == {b"b": b}
    table.move(table.root, b"unknown", table.root, b"b")
    assert table.root.children == {}


def test_a_guest_that_never_forgets_is_stopped(
    table: NodeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes_module, "MAX_NODES", 3)
    table.bind(table.root, b"a", seen(5))
    table.bind(table.root, b"b", seen(6))
    with pytest.raises(OSError, match="ENFILE"):
        table.bind(table.root, b"c", seen(7))


def test_a_guest_that_makes_names_of_one_file_without_end_is_stopped(
    table: NodeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hard links are no new nodes, and take memory all the same; names that are gone count no more."""
    monkeypatch.setattr(nodes_module, "MAX_NODES", 3)
    for name in (b"a", b"b", b"c"):
        node = table.bind(table.root, name, seen(5))
    with pytest.raises(OSError, match="ENFILE"):
        table.bind(table.root, b"d", seen(5))
    assert table.bind(table.root, b"a", seen(5)) is node  # that is known

    table.move(table.root, b"a", table.root, b"b")
    table.bind(table.root, b"d", seen(5))
    with pytest.raises(OSError, match="ENFILE"):
        table.bind(table.root, b"e", seen(5))
    assert table.forget(node.id, 5) is node
    assert [table.bind(table.root, name, seen(6)).id for name in (b"a", b"b", b"c")] == [3, 3, 3]


def test_what_is_in_a_directory_that_the_guest_forgot_too_early_can_be_saved(
    table: NodeTable,
) -> None:
    directory = table.bind(table.root, b"a", seen(5, stat.S_IFDIR))
    file = table.bind(directory, b"b", seen(6))
    table.forget(directory.id, 1)

    restored = NodeTable(seen(1, stat.S_IFDIR))
    restored.restore(table.export())

    assert restored[file.id].places == []
