"""taskvm.fs.memory, on taskvm.fs.inode: a file system like any other, within its limit."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.fs.memory import Memory
from taskvm.fs.provider import ROOT, Node
from taskvm.wire.fuse import SetAttr, SetAttrField


def change(valid: SetAttrField, **fields: int) -> SetAttr:
    defaults = {"size": 0, "atime_ns": 0, "mtime_ns": 0, "mode": 0, "uid": 0, "gid": 0}
    return SetAttr(valid, **(defaults | fields))


def names(memory: Memory, node: int = ROOT) -> list[bytes]:
    return [entry.name for entry in memory.readdir(node, 0, 1 << 20)][2:]


def failure(call: object, *arguments: object) -> int:
    assert callable(call)
    with pytest.raises(OSError, match="E") as caught:
        call(*arguments)
    return caught.value.errno or 0


def test_a_new_tree_is_empty() -> None:
    memory = Memory()
    assert names(memory) == []
    assert stat.S_ISDIR(memory.getattr(ROOT)[0].st_mode)


def test_a_saved_tree_is_the_same_and_goes_its_own_way() -> None:
    """Names, links, what is open without a name, attributes, offsets of listings, and what is left of the limit."""
    memory = Memory(limit_bytes=1 << 20)
    directory = memory.mkdir(ROOT, b"directory", 0o1770).node
    file = memory.create(directory, b"file\xff", 0o640, 0).node
    memory.write(file, 0, memoryview(b"data"), append=False)
    memory.setxattr(file, b"user.a", b"value", 0)
    memory.link(file, ROOT, b"second")
    memory.symlink(ROOT, b"link", b"second")
    opened = memory.create(ROOT, b"open", 0o600, 0).node
    memory.write(opened, 0, memoryview(b"still here"), append=False)
    memory.unlink(ROOT, b"open")
    listed = memory.readdir(ROOT, 0, 1)

    other = Memory(limit_bytes=1 << 20)
    other.import_state(memory.export_state())

    for each in (ROOT, directory, file, opened):
        assert other.getattr(each) == memory.getattr(each)
    assert other.lookup(directory, b"file\xff").node == other.lookup(ROOT, b"second").node == file
    assert other.read(opened, 0, 99) == b"still here"
    assert other.getxattr(file, b"user.a") == b"value"
    assert other.readdir(ROOT, listed[-1].offset, 4096) == memory.readdir(
        ROOT, listed[-1].offset, 4096
    )
    assert other.statfs(ROOT) == memory.statfs(ROOT)
    other.forget(opened, 1)
    assert failure(other.getattr, opened) == errno.ESTALE
    assert memory.read(opened, 0, 99) == b"still here"
    assert other.mkdir(ROOT, b"new", 0o700).node not in (ROOT, directory, file, opened)


def test_what_is_too_large_to_be_saved_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskvm.fs.memory.MAX_SAVED", 1 << 20)
    memory = Memory()
    file = memory.create(ROOT, b"file", 0o600, 0).node
    memory.write(file, 2 << 20, memoryview(b"data"), append=False)

    with pytest.raises(OSError, match="it holds 2 MiB, and 1 MiB"):
        memory.export_state()


@pytest.mark.parametrize(
    "state", [b"", b"\xc0", b"\x83\xa4used\x00\xa9following\x02\xa6inodes\x90"]
)
def test_what_is_no_saved_tree_is_refused(state: bytes) -> None:
    memory = Memory()
    whole = Memory().export_state()

    for wrong in (state, whole[:-1], whole.replace(b"following", b"followinG")):
        with pytest.raises(ValueError, match="(?i)the saved|invalid|object|truncated"):
            memory.import_state(wrong)


def test_an_unlinked_file_lives_until_it_is_forgotten() -> None:
    memory = Memory()
    file = memory.create(ROOT, b"file", 0o600, 0).node
    memory.write(file, 0, memoryview(b"data"), append=False)
    memory.unlink(ROOT, b"file")

    assert memory.read(file, 1, 2) == b"at"
    assert memory.getattr(file)[0].st_nlink == 0
    memory.forget(file, 1)
    assert failure(memory.getattr, file) == errno.ESTALE


def test_everything_is_charged_and_given_back() -> None:
    memory = Memory(limit_bytes=100_000)
    free = memory.statfs(ROOT).free
    file = memory.create(ROOT, b"file", 0o600, 0).node
    memory.write(file, 0, memoryview(bytes(50_000)), append=False)
    memory.setxattr(file, b"user.a", bytes(1000), 0)
    assert memory.statfs(ROOT).free < free - 10

    memory.unlink(ROOT, b"file")
    memory.forget(file, 1)

    assert (memory._used, memory.statfs(ROOT).free) == (0, free)


def test_the_limit_holds_before_anything_is_allocated() -> None:
    memory = Memory(limit_bytes=100_000)
    file = memory.create(ROOT, b"file", 0o600, 0).node

    assert failure(memory.setattr, file, change(SetAttrField.SIZE, size=1 << 60)) == errno.ENOSPC
    with pytest.raises(OSError, match="ENOSPC"):
        memory.write(file, 1 << 50, memoryview(b"x"), append=False)
    assert failure(memory.setxattr, file, b"user.a", bytes(100_000), 0) == errno.ENOSPC
    with pytest.raises(OSError, match="ENOSPC"):
        fill(memory)
    assert 10 < len(names(memory)) < 100


def fill(memory: Memory) -> None:
    for number in range(1000):
        memory.mkdir(ROOT, b"d%d" % number, 0o755)


def test_writes_append_pad_and_truncate() -> None:
    memory = Memory()
    file = memory.create(ROOT, b"file", 0o600, 0).node
    memory.write(file, 3, memoryview(b"abc"), append=False)
    memory.write(file, 0, memoryview(b"!"), append=True)
    assert memory.read(file, 0, 100) == b"\0\0\0abc!"
    memory.setattr(file, change(SetAttrField.SIZE, size=4))
    assert memory.read(file, 0, 100) == b"\0\0\0a"


def test_space_is_reserved_within_the_limit_and_holes_are_zeros() -> None:
    """As on the guest's own tmpfs: `fallocate -l`, and databases that begin with it."""
    memory = Memory(limit_bytes=100_000)
    node = memory.create(ROOT, b"file", 0o600, 0).node
    memory.write(node, 0, memoryview(b"data" * 10), append=False)

    memory.allocate(node, 0, 50_000, 0)
    memory.allocate(node, 0, 10, 0)
    memory.allocate(node, 4, 8, 3)
    memory.allocate(node, 60_000, 10, 3)

    assert memory.getattr(node)[0].st_size == 50_000
    assert memory.read(node, 0, 16) == b"data" + bytes(8) + b"data"
    with pytest.raises(OSError, match="ENOSPC"):
        memory.allocate(node, 0, 100_000, 0)
    assert memory.getattr(node)[0].st_size == 50_000


def test_create_honours_exclusion_and_truncation() -> None:
    memory = Memory()
    file = memory.create(ROOT, b"file", 0o600, os.O_EXCL).node
    memory.write(file, 0, memoryview(b"abc"), append=False)

    assert failure(memory.create, ROOT, b"file", 0o600, os.O_EXCL) == errno.EEXIST
    assert memory.create(ROOT, b"file", 0o600, 0).attr.st_size == 3
    assert memory.create(ROOT, b"file", 0o600, os.O_TRUNC).attr.st_size == 0


def test_renames() -> None:
    memory = Memory()
    a = memory.create(ROOT, b"a", 0o600, 0).node
    directory = memory.mkdir(ROOT, b"d", 0o755).node
    inner = memory.mkdir(directory, b"e", 0o755).node

    assert failure(memory.rename, ROOT, b"d", inner, b"x", 0) == errno.EINVAL
    assert failure(memory.rename, ROOT, b"a", ROOT, b"d", 0) == errno.EISDIR
    assert failure(memory.rename, ROOT, b"d", ROOT, b"a", 0) == errno.ENOTDIR
    assert failure(memory.rename, ROOT, b"a", ROOT, b"d", 1) == errno.EEXIST
    assert failure(memory.rmdir, ROOT, b"d") == errno.ENOTEMPTY
    memory.rename(ROOT, b"a", inner, b"b", 0)
    assert memory.lookup(inner, b"b").node == a
    assert failure(memory.rename, inner, b"b", ROOT, b"d", 2) == errno.EINVAL
    other = memory.mkdir(ROOT, b"other", 0o755).node
    memory.rename(inner, b"b", ROOT, b"other", 2)
    assert (memory.lookup(ROOT, b"other").node, memory.lookup(inner, b"b").node) == (a, other)
    assert failure(memory.rename, ROOT, b"d", other, b"x", 0) == errno.EINVAL


def test_what_is_missing_or_of_another_kind_is_refused() -> None:
    memory = Memory()
    file = memory.create(ROOT, b"file", 0o600, 0).node
    link = memory.symlink(ROOT, b"link", b"../target").node

    assert memory.readlink(link) == b"../target"
    assert failure(memory.lookup, ROOT, b"none") == errno.ENOENT
    assert failure(memory.lookup, ROOT, b"x" * 256) == errno.ENAMETOOLONG
    assert failure(memory.mkdir, ROOT, b"x" * 256, 0) == errno.ENAMETOOLONG
    assert failure(memory.lookup, file, b"x") == errno.ENOTDIR
    assert failure(memory.read, ROOT, 0, 1) == errno.EISDIR
    assert failure(memory.read, link, 0, 1) == errno.EINVAL
    assert failure(memory.readlink, file) == errno.EINVAL
    assert failure(memory.unlink, ROOT, b"none") == errno.ENOENT
    assert failure(memory.rmdir, ROOT, b"file") == errno.ENOTDIR
    assert failure(memory.mknod, ROOT, b"dev", stat.S_IFCHR) == errno.EPERM
    assert failure(memory.link, ROOT, ROOT, b"x") == errno.EPERM
    assert failure(memory.setattr, file, change(SetAttrField.UID, uid=4242)) == errno.EPERM
    assert failure(memory.setxattr, file, b"security.x", b"", 0) == errno.EOPNOTSUPP
    assert failure(memory.getxattr, file, b"user.x") == errno.ENODATA


def test_a_reading_that_is_resumed_misses_nothing_while_names_come_and_go() -> None:
    memory = Memory()
    for number in range(50):
        memory.mkdir(ROOT, b"%d" % number, 0o755)
    seen: list[bytes] = []
    offset = 0

    while batch := memory.readdir(ROOT, offset, 100):
        seen.append(batch[0].name)
        offset = batch[0].offset
        if batch[0].name == b"20":
            memory.rmdir(ROOT, b"20")
            memory.rmdir(ROOT, b"40")
            memory.mkdir(ROOT, b"new", 0o755)

    stable = {b"%d" % number for number in range(50)} - {b"40"}
    assert set(seen) == stable | {b".", b"..", b"new"}
    assert len(seen) == len(set(seen))


class Model:
    """The names of the root and the inode of each, changed as POSIX says."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.nodes: dict[bytes, int] = {}

    def create(self, a: bytes, b: bytes) -> None:
        self.nodes[a] = self.memory.create(ROOT, a, 0o600, os.O_EXCL).node

    def unlink(self, a: bytes, b: bytes) -> None:
        self.memory.unlink(ROOT, a)
        del self.nodes[a]

    def link(self, a: bytes, b: bytes) -> None:
        self.nodes[b] = self.memory.link(self.memory.lookup(ROOT, a).node, ROOT, b).node

    def rename(self, a: bytes, b: bytes) -> None:
        self.memory.rename(ROOT, a, ROOT, b, 0)
        if self.nodes[a] != self.nodes.get(b):
            self.nodes[b] = self.nodes.pop(a)

    def move(self, a: bytes, b: bytes) -> None:
        self.memory.rename(ROOT, a, ROOT, b, 1)
        self.nodes[b] = self.nodes.pop(a)

    def exchange(self, a: bytes, b: bytes) -> None:
        self.memory.rename(ROOT, a, ROOT, b, 2)
        self.nodes[a], self.nodes[b] = self.nodes[b], self.nodes[a]


ACTIONS = (Model.create, Model.unlink, Model.link, Model.rename, Model.move, Model.exchange)
NAMES = st.sampled_from([b"a", b"b", b"c"])


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), NAMES, NAMES), max_size=60))
def test_any_sequence_of_changes_follows_the_model_and_gives_everything_back(
    steps: list[tuple[Callable[[Model, bytes, bytes], None], bytes, bytes]],
) -> None:
    model = Model(memory := Memory())
    for action, a, b in steps:
        with suppress(FileNotFoundError, FileExistsError):
            action(model, a, b)
        assert set(names(memory)) == set(model.nodes)
        assert {name: memory.lookup(ROOT, name).node for name in model.nodes} == model.nodes
    for name in names(memory):
        memory.unlink(ROOT, name)
    for node in list(memory._inodes):
        memory.forget(node, 10_000)
    assert memory._used == 0


def test_each_mount_of_a_subclass_is_one_of_it() -> None:
    class Shouting(Memory):
        def read(self, node: Node, offset: int, size: int) -> bytes:
            return super().read(node, offset, size).upper()

    value = Shouting()
    first, second = value.opened(), value.opened()
    file = first.create(ROOT, b"file", 0o644, 0).node
    first.write(file, 0, memoryview(b"data"), append=False)

    assert first.read(file, 0, 10) == b"DATA"
    assert [entry.name for entry in second.readdir(ROOT, 0, 4096)] == [b".", b".."]
