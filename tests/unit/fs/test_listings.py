"""Listings that are read in parts: taskvm.fs.listings, where offsets count the entries before them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from taskvm.fs import listings as listings_module
from taskvm.fs.listings import MOST, Listings, Raw

NODE, AT = 7, -1


class Counting:
    """A directory as tmpfs had it before Linux 6.6: who reads on goes on, and who seeks counts from the start.

    It stands for `os` and `syscalls` of the module.
    """

    SEEK_SET = os.SEEK_SET

    def __init__(self) -> None:
        self.names = [b"%03d" % number for number in range(200)]
        self.opened = 0
        self._left: dict[int, tuple[int, list[bytes]]] = {}

    def open(self, _name: bytes, _flags: int, *, dir_fd: int) -> int:
        self.opened += 1
        fd = os.open("/dev/null", os.O_RDONLY)
        return self.lseek(fd, 0, self.SEEK_SET)

    def lseek(self, fd: int, offset: int, _whence: int) -> int:
        self._left[fd] = (offset, self.names[offset:])
        return fd

    def read_directory(self, fd: int, size: int) -> list[Raw]:
        offset, left = self._left[fd]
        left = [name for name in left if name in self.names]
        part, left = left[: size // 32], left[size // 32 :]
        self._left[fd] = (offset + len(part), left)
        return [(name, 1, 0, offset + index + 1) for index, name in enumerate(part)]


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(listings_module, "os", counting)
    monkeypatch.setattr(listings_module, "syscalls", counting)
    return counting


@pytest.fixture
def listings() -> Iterator[Listings]:
    made = Listings()
    yield made
    made.close()


def parts(listings: Listings, taken: int, size: int = 320) -> Iterator[list[bytes]]:
    """Take at most so many of each part, as when there is no room for more."""
    offset = 0
    while entries := listings.read(NODE, AT, offset, size)[:taken]:
        yield [name for name, *_rest in entries]
        offset = entries[-1][3]


@pytest.mark.parametrize("taken", [1, 3, 10])
def test_all_can_be_removed_while_they_are_listed(
    directory: Counting, listings: Listings, taken: int
) -> None:
    for part in parts(listings, taken):
        for name in part:
            directory.names.remove(name)

    assert directory.names == []
    assert directory.opened == 1
    assert len(listings) == 0


def test_two_may_list_a_directory_at_the_same_time(directory: Counting, listings: Listings) -> None:
    before = list(directory.names)
    seen: tuple[list[bytes], list[bytes]] = ([], [])
    for both in zip(parts(listings, 10), parts(listings, 7), strict=False):
        for names, part in zip(seen, both, strict=True):
            names += part
    assert seen == (before, before[: len(seen[1])])


def test_an_offset_of_long_ago_is_found_by_the_file_system(
    directory: Counting, listings: Listings
) -> None:
    first = listings.read(NODE, AT, 0, 320)
    listings.read(NODE, AT, first[-1][3], 320)

    again = listings.read(NODE, AT, first[0][3], 320)

    assert again[0] == first[1]
    assert directory.opened == 2


def test_no_more_than_a_few_are_kept(directory: Counting, listings: Listings) -> None:
    for node in range(MOST + 5):
        listings.read(node, AT, 0, 320)
    assert len(listings) == MOST
    assert len(listings.read(0, AT, 10, 320)) == 10  # which is no longer kept

    for node in range(MOST + 5):
        listings.forget(node)
    assert len(listings) == 0
