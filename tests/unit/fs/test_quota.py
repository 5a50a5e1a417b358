"""taskvm.fs.quota: a guest takes no more than it may, however it asks."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taskvm.errors import UsageError
from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.provider import ROOT, Node
from taskvm.fs.quota import Quota
from taskvm.wire.fuse import SetAttr, SetAttrField


@pytest.fixture
def quota(tmp_path: Path) -> Iterator[Quota]:
    served = Quota(HostDir(tmp_path), limit_bytes=1000, limit_files=5).opened()
    yield served
    served.close()


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


def test_bytes_are_refused_by_every_way_to_add_them(quota: Quota, tmp_path: Path) -> None:
    file, other = make(quota, b"file", bytes(600)), make(quota, b"other", bytes(100))

    for attempt in (
        lambda: quota.write(other, 100, memoryview(bytes(301)), append=False),
        lambda: quota.write(other, 0, memoryview(bytes(301)), append=True),
        lambda: quota.write(other, 1 << 40, memoryview(b"x"), append=False),
        lambda: quota.setattr(other, resized(1 << 60)),
        lambda: quota.allocate(other, 0, 401, 0),
        lambda: quota.copy_range(file, 0, other, 100, 600),
        lambda: quota.symlink(ROOT, b"link", b"x" * 301),
        lambda: quota.setxattr(other, b"user.a", bytes(400), 0),
    ):
        assert failure(attempt) == errno.EDQUOT
    assert failure(lambda: quota.allocate(other, 0, 1 << 40, 1)) == errno.EOPNOTSUPP

    assert quota.used_bytes == 700
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 700


def test_names_are_refused_by_every_way_to_add_them(quota: Quota, tmp_path: Path) -> None:
    file = make(quota, b"0")
    quota.mkdir(ROOT, b"1", 0o755)
    quota.symlink(ROOT, b"2", b"x")
    quota.mknod(ROOT, b"3", 0o644)
    make(quota, b"4")

    for attempt in (
        lambda: quota.create(ROOT, b"5", 0o644, 0),
        lambda: quota.mkdir(ROOT, b"5", 0o755),
        lambda: quota.symlink(ROOT, b"5", b"x"),
        lambda: quota.mknod(ROOT, b"5", 0o644),
    ):
        assert failure(attempt) == errno.EDQUOT
    quota.create(ROOT, b"0", 0o644, 0)  # it is there
    quota.link(file, ROOT, b"further")  # a name of what is counted

    assert len(list(tmp_path.iterdir())) == 6


def test_what_is_removed_is_given_back_when_nobody_holds_it(quota: Quota) -> None:
    """A program that keeps its removed file open keeps its space too."""
    file = make(quota, b"file", bytes(1000))
    quota.unlink(ROOT, b"file")
    assert failure(lambda: make(quota, b"next", b"x")) == errno.EDQUOT
    quota.unlink(ROOT, b"next")

    quota.forget(file, 1)

    make(quota, b"another", bytes(1000))


def test_what_is_replaced_or_cut_is_given_back(quota: Quota) -> None:
    old, new = make(quota, b"old", bytes(400)), make(quota, b"new", bytes(500))
    quota.rename(ROOT, b"new", ROOT, b"old", 0)
    quota.forget(old, 1)
    assert (quota.used_bytes, quota.used_files) == (500, 1)

    quota.setattr(new, resized(100))
    quota.create(ROOT, b"old", 0o644, os.O_TRUNC)
    assert quota.used_bytes == 0


def test_a_file_counts_until_its_last_name_is_gone(quota: Quota) -> None:
    file = make(quota, b"file", bytes(500))
    quota.link(file, ROOT, b"link")
    quota.forget(file, 2)

    quota.unlink(ROOT, b"file")
    assert quota.used_bytes == 500
    quota.unlink(ROOT, b"link")
    assert (quota.used_bytes, quota.used_files) == (0, 0)


def test_what_was_there_before_is_free(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    quota = Quota(HostDir(tmp_path), limit_bytes=10).opened()
    large = quota.lookup(ROOT, b"large").node

    quota.write(large, 0, memoryview(b"changed"), append=False)
    assert failure(lambda: quota.write(large, 1 << 20, memoryview(bytes(11)), append=False))
    quota.close()


def test_the_size_of_the_file_system_is_what_is_left(quota: Quota) -> None:
    make(quota, b"file", bytes(500))
    told = quota.statfs(ROOT)

    assert told.available * told.fragment_size <= 500
    assert (told.files, told.files_free) == (5, 4)


def test_any_sequence_of_operations_counts_what_is_there(tmp_path: Path) -> None:
    """Against the host's own count, with names linked, replaced and removed at random."""
    quota, chance = (
        Quota(HostDir(tmp_path), limit_bytes=5000, limit_files=8).opened(),
        random.Random(3),
    )
    for _ in range(1500):
        a, b = (b"n%d" % chance.randrange(6) for _ in "ab")
        steps: tuple[Callable[[], object], ...] = (
            lambda a=a: quota.forget(
                quota.create(ROOT, a, 0o644, chance.choice((0, os.O_TRUNC))).node, 1
            ),
            lambda a=a: _write(quota, a, chance.randrange(2000)),
            lambda a=a, b=b: quota.rename(ROOT, a, ROOT, b, chance.choice((0, 0, 2))),
            lambda a=a, b=b: _link(quota, a, b),
            lambda a=a: quota.unlink(ROOT, a),
        )
        try:
            chance.choice(steps)()
        except OSError as error:
            assert error.errno in (errno.EDQUOT, errno.ENOENT, errno.EEXIST)  # noqa: PT017
        there = {path.stat().st_ino: path.stat().st_size for path in tmp_path.iterdir()}
        assert (quota.used_bytes, quota.used_files) == (sum(there.values()), len(there))
        assert quota.used_bytes <= 5000
    quota.close()


def _write(quota: Quota, name: bytes, size: int) -> None:
    node = quota.lookup(ROOT, name).node
    try:
        quota.write(node, size, memoryview(b"x" * 100), append=False)
    finally:
        quota.forget(node, 1)


def _link(quota: Quota, name: bytes, new_name: bytes) -> None:
    node = quota.lookup(ROOT, name).node
    try:
        quota.forget(quota.link(node, ROOT, new_name).node, 1)
    finally:
        quota.forget(node, 1)


def test_a_saved_quota_goes_on_counting(tmp_path: Path) -> None:
    before = Quota(HostDir(tmp_path), limit_bytes=1000).opened()
    open_one = make(before, b"open", bytes(400))
    make(before, b"kept", bytes(300))

    after = Quota(HostDir(tmp_path), limit_bytes=1000).opened()
    after.import_state(before.export_state())
    before.close()

    assert after.used_bytes == 700
    assert after.read(open_one, 0, 500) == bytes(400)
    assert failure(lambda: make(after, b"more", bytes(301))) == errno.EDQUOT
    after.close()


def test_a_negative_limit_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="negative"):
        Quota(Memory(), limit_bytes=-1)
