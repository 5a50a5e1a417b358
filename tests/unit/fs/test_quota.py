"""taskvm.fs.quota: a guest takes no more than it may, however it asks."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taskvm.errors import UsageError
from taskvm.fs.attributes import BLOCK
from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.provider import ROOT, Node
from taskvm.fs.quota import Quota
from taskvm.wire.fuse import SetAttr, SetAttrField


@pytest.fixture
def quota(tmp_path: Path) -> Iterator[Quota]:
    served = Quota(HostDir(tmp_path), limit_bytes=10 * BLOCK, limit_files=5).opened()
    assert isinstance(served, Quota)
    yield served
    served.close()


def taken(directory: Path) -> int:
    """What everything below `directory` takes of the disk, as the host's own tools would say."""
    inodes = {path.lstat().st_ino: path.lstat() for path in directory.rglob("*")}
    return sum(max(BLOCK, each.st_blocks * 512) for each in inodes.values())


def make(quota: Quota, name: bytes, data: bytes = b"") -> Node:
    node = quota.create(ROOT, name, 0o644, os.O_EXCL).node
    if data:
        quota.write(node, 0, memoryview(data), append=False)
    return node


def resized(size: int) -> SetAttr:
    return SetAttr(SetAttrField.SIZE, size, 0, 0, 0, 0, 0)


def failure(call: Callable[[], object]) -> int:
    with pytest.raises(OSError, match="E") as caught:
        call()
    return caught.value.errno or 0


def until_refused(do: Callable[[int], object]) -> int:
    """Do it a thousand times, or until the quota refuses; return how often it was done."""
    for number in range(1000):
        try:
            do(number)
        except OSError as error:
            assert error.errno == errno.EDQUOT  # noqa: PT017 - it need not be refused
            return number
    return 1000


def test_bytes_are_refused_by_every_way_to_add_them(quota: Quota, tmp_path: Path) -> None:
    file, other = make(quota, b"file", bytes(6 * BLOCK)), make(quota, b"other", bytes(100))

    for attempt in (
        lambda: quota.write(other, 100, memoryview(bytes(4 * BLOCK)), append=False),
        lambda: quota.write(other, 0, memoryview(bytes(4 * BLOCK)), append=True),
        lambda: quota.write(other, 1 << 40, memoryview(b"x"), append=False),
        lambda: quota.setattr(other, resized(1 << 60)),
        lambda: quota.allocate(other, 0, 4 * BLOCK + 1, 0),
        lambda: quota.copy_range(file, 0, other, 100, 6 * BLOCK),
        lambda: quota.symlink(ROOT, b"link", b"x" * (3 * BLOCK + 1)),
        lambda: quota.setxattr(other, b"user.a", bytes(3 * BLOCK), 0),
    ):
        assert failure(attempt) == errno.EDQUOT
    assert failure(lambda: quota.allocate(other, 0, 1 << 40, 1)) == errno.EOPNOTSUPP

    assert quota.charges.used == taken(tmp_path) == 7 * BLOCK


def test_names_are_refused_by_every_way_to_add_them(quota: Quota, tmp_path: Path) -> None:
    """A further name too: a directory of nothing but links to one file takes its space."""
    file = make(quota, b"0")
    quota.mkdir(ROOT, b"1", 0o755)
    quota.symlink(ROOT, b"2", b"x")
    quota.link(file, ROOT, b"3")
    quota.mknod(ROOT, b"4", 0o644)

    for attempt in (
        lambda: quota.create(ROOT, b"5", 0o644, 0),
        lambda: quota.mkdir(ROOT, b"5", 0o755),
        lambda: quota.symlink(ROOT, b"5", b"x"),
        lambda: quota.mknod(ROOT, b"5", 0o644),
        lambda: quota.link(file, ROOT, b"5"),
    ):
        assert failure(attempt) == errno.EDQUOT
    quota.create(ROOT, b"0", 0o644, 0)  # it is there

    assert len(list(tmp_path.iterdir())) == 5


def test_what_is_empty_is_not_free(tmp_path: Path) -> None:
    """A directory takes a block, and a file that grows by one byte does."""
    quota = Quota(HostDir(tmp_path), limit_bytes=100 * BLOCK).opened()
    make_more: tuple[Callable[[bytes], object], ...] = (
        lambda name: quota.mkdir(ROOT, name, 0o755),
        lambda name: make(quota, name),
        lambda name: quota.symlink(ROOT, name, b"x"),
    )

    made = until_refused(lambda number: make_more[number % 3](b"%d" % number))

    assert made <= 100
    assert taken(tmp_path) <= 100 * BLOCK
    quota.close()


def test_names_are_not_free_where_only_bytes_are_limited(tmp_path: Path) -> None:
    """The directory that they are in grows, and on most file systems it never shrinks again."""
    quota = Quota(HostDir(tmp_path), limit_bytes=10 * BLOCK).opened()
    empty = tmp_path.stat().st_size
    file = make(quota, b"file")

    linked = until_refused(lambda number: quota.link(file, ROOT, b"%0250d" % number))

    grown = tmp_path.stat().st_size - empty
    assert grown <= 13 * BLOCK  # the limit, and what its last name made of it
    for number in range(linked):
        quota.unlink(ROOT, b"%0250d" % number)
    left = max(0, tmp_path.stat().st_size - empty)
    assert quota.charges.used >= left
    quota.close()


def test_the_holes_of_what_was_there_are_not_free(tmp_path: Path) -> None:
    """They cost nothing until the guest fills them; those that it makes itself are counted at once."""
    os.truncate(_touched(tmp_path / "sparse"), 1000 * BLOCK)
    quota = Quota(HostDir(tmp_path), limit_bytes=20 * BLOCK).opened()
    sparse = quota.lookup(ROOT, b"sparse").node
    fill: tuple[Callable[[int], object], ...] = (
        lambda at: quota.write(sparse, at, memoryview(bytes(BLOCK)), append=False),
        lambda at: quota.allocate(sparse, at, BLOCK, 0),
    )

    filled = until_refused(lambda number: fill[number % 2](number * BLOCK))

    assert filled < 1000
    assert (tmp_path / "sparse").stat().st_blocks * 512 <= 21 * BLOCK
    quota.setattr(sparse, resized(0))
    assert quota.charges.used <= BLOCK
    own = make(quota, b"own")
    quota.setattr(own, resized(10 * BLOCK))
    for number in range(10):
        quota.write(own, number * BLOCK, memoryview(bytes(BLOCK)), append=False)  # paid for
    quota.close()


def _touched(path: Path) -> Path:
    path.touch()
    return path


def test_what_is_removed_is_given_back_when_nobody_holds_it(quota: Quota) -> None:
    """A program that keeps its removed file open keeps its space too, and can go on to write to it."""
    file = make(quota, b"file", bytes(5 * BLOCK))
    quota.unlink(ROOT, b"file")
    quota.write(file, 5 * BLOCK, memoryview(bytes(5 * BLOCK)), append=False)
    assert failure(lambda: make(quota, b"next", b"x")) == errno.EDQUOT

    quota.forget(file, 1)

    assert (quota.charges.used, quota.used_files) == (0, 0)
    make(quota, b"another", bytes(10 * BLOCK))


def test_what_is_replaced_or_cut_is_given_back(quota: Quota) -> None:
    old, new = make(quota, b"old", bytes(4 * BLOCK)), make(quota, b"new", bytes(5 * BLOCK))
    quota.rename(ROOT, b"new", ROOT, b"old", 0)
    quota.forget(old, 1)
    assert (quota.charges.used, quota.used_files) == (5 * BLOCK, 1)

    quota.setattr(new, resized(100))
    assert quota.charges.used == BLOCK
    quota.create(ROOT, b"old", 0o644, os.O_TRUNC)
    assert quota.charges.used == BLOCK


def test_a_file_counts_until_its_last_name_is_gone(quota: Quota) -> None:
    file = make(quota, b"file", bytes(500))
    quota.link(file, ROOT, b"link")
    quota.forget(file, 2)

    quota.unlink(ROOT, b"file")
    assert (quota.charges.used, quota.used_files) == (BLOCK, 1)
    quota.unlink(ROOT, b"link")
    assert (quota.charges.used, quota.used_files) == (0, 0)


def test_what_was_there_before_is_free(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    quota = Quota(HostDir(tmp_path), limit_bytes=10).opened()
    large = quota.lookup(ROOT, b"large").node

    quota.write(large, 0, memoryview(b"changed"), append=False)
    grow = lambda: quota.write(large, 1 << 20, memoryview(bytes(11)), append=False)  # noqa: E731
    assert failure(grow) == errno.EDQUOT
    quota.close()


def test_the_size_of_the_file_system_is_what_is_left(quota: Quota) -> None:
    make(quota, b"file", bytes(500))
    told = quota.statfs(ROOT)

    assert told.available * told.fragment_size <= 9 * BLOCK
    assert (told.files, told.files_free) == (5, 4)


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_operations_counts_what_is_there(tmp_path: Path, seed: int) -> None:
    """Against the host's own count, with names linked, replaced and removed at random, and holes made and filled."""
    quota, chance = (
        Quota(HostDir(tmp_path), limit_bytes=30 * BLOCK, limit_files=8).opened(),
        random.Random(seed),
    )
    for _ in range(1500):
        a, b = (b"n%d" % chance.randrange(6) for _ in "ab")
        steps: tuple[Callable[[], object], ...] = (
            lambda a=a: quota.forget(
                quota.create(ROOT, a, 0o644, chance.choice((0, os.O_TRUNC))).node, 1
            ),
            lambda a=a: _write(quota, a, chance.randrange(5 * BLOCK)),
            lambda a=a: _change(quota, a, resized(chance.randrange(9 * BLOCK))),
            lambda a=a, b=b: quota.rename(ROOT, a, ROOT, b, chance.choice((0, 0, 2))),
            lambda a=a, b=b: _link(quota, a, b),
            lambda a=a: quota.unlink(ROOT, a),
        )
        try:
            chance.choice(steps)()
        except OSError as error:
            assert error.errno in (errno.EDQUOT, errno.ENOENT, errno.EEXIST)  # noqa: PT017
        there = {path.stat().st_ino: path.stat().st_size for path in tmp_path.iterdir()}
        lengths = sum(max(BLOCK, -(-size // BLOCK) * BLOCK) for size in there.values())
        names = sum(1 for _ in tmp_path.iterdir())
        assert (quota.charges.used, quota.used_files) == (lengths, names)
        assert taken(tmp_path) <= quota.charges.used <= 30 * BLOCK
    quota.close()


def _write(quota: Quota, name: bytes, size: int) -> None:
    node = quota.lookup(ROOT, name).node
    try:
        quota.write(node, size, memoryview(b"x" * 100), append=False)
    finally:
        quota.forget(node, 1)


def _change(quota: Quota, name: bytes, changes: SetAttr) -> None:
    node = quota.lookup(ROOT, name).node
    try:
        quota.setattr(node, changes)
    finally:
        quota.forget(node, 1)


def _link(quota: Quota, name: bytes, new_name: bytes) -> None:
    node = quota.lookup(ROOT, name).node
    try:
        quota.forget(quota.link(node, ROOT, new_name).node, 1)
    finally:
        quota.forget(node, 1)


def test_attributes_count_until_they_or_their_file_are_gone(quota: Quota) -> None:
    file = make(quota, b"file")
    quota.setxattr(file, b"user.a", bytes(100), 0)
    quota.setxattr(file, b"user.b", bytes(100), 0)
    assert quota.charges.used == 2 * BLOCK  # one block holds both

    quota.removexattr(file, b"user.a")
    quota.removexattr(file, b"user.b")
    assert quota.charges.used == BLOCK

    quota.setxattr(file, b"user.c", bytes(100), 0)
    quota.unlink(ROOT, b"file")
    quota.forget(file, 1)
    assert quota.charges.used == 0


def test_what_the_host_does_meanwhile_is_not_the_guests(quota: Quota, tmp_path: Path) -> None:
    file = make(quota, b"file", bytes(BLOCK))
    (tmp_path / "file").write_bytes(bytes(100 * BLOCK))

    quota.write(file, 0, memoryview(b"x"), append=False)

    assert quota.charges.used == BLOCK


def test_a_saved_quota_goes_on_counting(tmp_path: Path) -> None:
    before = Quota(HostDir(tmp_path), limit_bytes=10 * BLOCK).opened()
    open_one = make(before, b"open", bytes(4 * BLOCK))
    kept = make(before, b"kept", bytes(10))
    before.unlink(ROOT, b"kept")

    after = Quota(HostDir(tmp_path), limit_bytes=10 * BLOCK).opened()
    assert isinstance(after, Quota)
    after.import_state(before.export_state())
    before.close()

    assert after.charges.used == 5 * BLOCK
    assert after.read(open_one, 0, 500) == bytes(500)
    assert failure(lambda: make(after, b"more", bytes(5 * BLOCK + 1))) == errno.EDQUOT
    after.forget(kept, 1)
    assert after.charges.used == 5 * BLOCK
    after.close()


def test_a_negative_limit_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="negative"):
        Quota(Memory(), limit_bytes=-1)
