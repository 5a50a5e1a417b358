"""taskvm.fs.pathprovider: a few methods on paths are a file system, within what it says it cannot do."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from examples.dictionary import Dictionary

from taskvm.fs.conformance import ProviderConformance
from taskvm.fs.pathprovider import PathProvider, PathStat
from taskvm.fs.provider import ROOT, Change, Provider


class Tree(PathProvider):
    """A tree in two dictionaries, with plain methods."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.directories = {"/"}

    def stat(self, path: str) -> PathStat:
        if path in self.directories:
            return PathStat(directory=True)
        if path not in self.files:
            raise FileNotFoundError(path)
        return PathStat(size=len(self.files[path]))

    def list(self, path: str) -> Iterable[str]:
        prefix = path.rstrip("/") + "/"
        below = [each[len(prefix) :] for each in {*self.files, *self.directories} if each != "/"
                 and each.startswith(prefix)]  # fmt: skip
        return [name for name in below if "/" not in name]

    def read_file(self, path: str, offset: int, size: int) -> bytes:
        return self.files[path][offset : offset + size]

    def write_file(self, path: str, offset: int, data: bytes) -> None:
        assert offset <= len(self.files[path])
        self.files[path] = self.files[path][:offset] + data + self.files[path][offset + len(data) :]

    def make(self, path: str, *, directory: bool) -> None:
        if directory:
            self.directories.add(path)
        else:
            self.files[path] = b""

    def resize(self, path: str, size: int) -> None:
        self.files[path] = self.files[path][:size].ljust(size, b"\0")

    def remove(self, path: str, *, directory: bool) -> None:
        if directory:
            self.directories.remove(path)
        else:
            del self.files[path]

    def move(self, path: str, new_path: str) -> None:
        def moved(each: str) -> str:
            inside = each == path or each.startswith(path + "/")
            return new_path + each[len(path) :] if inside else each

        self.files = {moved(each): data for each, data in self.files.items()}
        self.directories = {moved(each) for each in self.directories}


def test_a_saved_guest_goes_on_with_the_paths_it_knows() -> None:
    """By the same numbers; it is told to doubt all that it knew, for nobody watched meanwhile."""
    tree = Tree()
    tree.directories.add("/d")
    tree.files = {"/d/caf\udce9": b"one", "/gone": b"gone"}
    before = tree.opened()
    directory = before.lookup(ROOT, b"d").node
    file, gone = before.lookup(directory, b"caf\xe9").node, before.lookup(ROOT, b"gone").node
    listed = before.readdir(directory, 0, 4096)
    state = before.export_state()
    before.close()
    tree.files = {"/d/caf\udce9": b"two"}

    after, told = tree.opened(), list[Change]()
    after.changes = told.append
    after.import_state(state)

    assert after.read(file, 0, 10) == b"two"
    assert after.readdir(directory, listed[1].offset, 4096) == listed[2:]
    assert {Change(file), Change(directory, b"caf\xe9"), Change(ROOT, b"gone")} <= set(told)
    with pytest.raises(FileNotFoundError):
        after.getattr(gone)
    assert after.create(ROOT, b"new", 0o644, 0).node not in (ROOT, directory, file, gone)
    after.close()


class TestPathProvider(ProviderConformance):
    links = symlinks = modes = orphans = False

    def make(self, directory: Path) -> Provider:
        return Tree()


class Slow(Dictionary):
    async def read_file(self, path: str, offset: int, size: int) -> bytes:
        await asyncio.sleep(60)
        raise AssertionError("it was not stopped")


def failure(call: Callable[[], object]) -> int:
    with pytest.raises(OSError, match="E") as caught:
        call()
    return caught.value.errno or 0


def test_coroutines_are_waited_for() -> None:
    store = {"a": b"one", "b": b""}
    served = Dictionary(store).opened()
    made = served.create(ROOT, b"c", 0o644, 0).node

    served.write(made, 2, memoryview(b"x"), append=False)

    assert store["c"] == b"\0\0x"
    assert served.read(served.lookup(ROOT, b"a").node, 1, 9) == b"ne"
    assert [entry.name for entry in served.readdir(ROOT, 0, 4096)] == [
        b".",
        b"..",
        b"a",
        b"b",
        b"c",
    ]
    served.close()


def test_a_coroutine_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Slow({"a": b"one"}).opened()
    file = served.lookup(ROOT, b"a").node

    with monkeypatch.context() as patch:
        patch.setattr(Slow, "deadline_s", 0.05)
        assert failure(lambda: served.read(file, 0, 9)) == errno.ETIMEDOUT

    assert served.lookup(ROOT, b"a").node == file
    served.close()


def test_without_a_way_to_write_it_is_read_only() -> None:
    class Reading(PathProvider):
        def stat(self, path: str) -> PathStat:
            return PathStat(directory=path == "/", size=1)

    assert Reading().opened().readonly
    assert not Tree().opened().readonly


def test_a_removed_file_is_not_mistaken_for_the_next_of_its_name() -> None:
    served = Tree().opened()
    old = served.create(ROOT, b"file", 0o644, 0).node
    served.unlink(ROOT, b"file")
    new = served.create(ROOT, b"file", 0o644, 0).node

    assert old != new
    assert failure(lambda: served.write(old, 0, memoryview(b"x"), append=False)) == errno.ESTALE


def test_names_that_lead_elsewhere_are_not_listed() -> None:
    class Lying(Tree):
        def list(self, path: str) -> Iterable[str]:
            return ["..", ".", "", "a/b", "fine"]

    assert [entry.name for entry in Lying().opened().readdir(ROOT, 0, 4096)] == [
        b".",
        b"..",
        b"fine",
    ]


def test_each_mount_has_nodes_and_a_loop_of_its_own() -> None:
    provider = Dictionary({"a": b"one"})
    first, second = provider.opened(), provider.opened()
    node = first.lookup(ROOT, b"a").node

    first.close()

    assert second.lookup(ROOT, b"a").node == node
    assert second.read(node, 0, 9) == b"one"
    second.close()
