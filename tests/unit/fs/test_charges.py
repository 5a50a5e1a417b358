"""taskvm.fs.charges: what files take, also on file systems that tell it late, early or otherwise."""

from __future__ import annotations

import stat

import pytest

from taskvm.fs.attributes import BLOCK, Attributes
from taskvm.fs.charges import Charges


def attributes(size: int, taken: int, *, ino: int = 7, mode: int = stat.S_IFREG) -> Attributes:
    made = Attributes.made(ino, mode | 0o644, size=size)
    fields = {name: getattr(made, name) for name in made.__struct_fields__}
    return Attributes(**fields | {"st_blocks": taken // 512})


def test_a_file_system_that_tells_late_gives_nothing_back_that_was_not_counted() -> None:
    """ZFS: blocks show seconds after the write."""
    charges = Charges()
    charges.add(attributes(0, 0))
    charges.settle(attributes(0, 0), attributes(5000, 0))

    charges.remove(attributes(5000, 2 * BLOCK))

    assert charges.used == 0


def test_blocks_that_a_file_system_takes_in_advance_are_not_the_guests() -> None:
    """XFS: beyond the end of a file that grows, until it is closed."""
    charges = Charges()
    charges.add(attributes(0, 0))
    charges.settle(attributes(0, 0), attributes(BLOCK, 64 * BLOCK))

    assert charges.used == BLOCK


def test_small_and_large_files_are_given_back_to_the_block() -> None:
    charges = Charges()
    for number, size in enumerate((0, 1, BLOCK, BLOCK + 1, 100_000)):
        charges.add(attributes(0, 0, ino=number))
        full = -(-size // BLOCK) * BLOCK
        charges.settle(attributes(0, 0, ino=number), attributes(size, full, ino=number))
        assert charges.used == max(BLOCK, full)
        charges.settle(attributes(size, full, ino=number), attributes(0, 0, ino=number))
        assert charges.used == BLOCK
        charges.remove(attributes(0, 0, ino=number))
        assert charges.used == 0
    assert charges.by_ino == {}


def test_only_what_the_attributes_do_not_tell_is_remembered() -> None:
    charges = Charges()
    charges.add(attributes(0, 0))
    charges.settle(attributes(0, 0), attributes(BLOCK, BLOCK))

    assert charges.by_ino == {}
    assert charges.used == BLOCK


@pytest.mark.parametrize("taken", [0, BLOCK])
def test_an_empty_file_that_was_there_gives_back_what_it_took(taken: int) -> None:
    charges = Charges()

    charges.remove(attributes(0, taken))

    assert charges.used == -taken


def test_growth_is_what_it_will_be_at_most() -> None:
    charges = Charges()
    dense, sparse = attributes(10 * BLOCK, 10 * BLOCK), attributes(10 * BLOCK, BLOCK)

    assert charges.growth(dense, 0, BLOCK) == 0
    assert charges.growth(dense, 10 * BLOCK - 1, 2) == BLOCK
    assert charges.growth(sparse, 5 * BLOCK - 1, 2) == 2 * BLOCK
    assert charges.growth(sparse, 0, 10 * BLOCK) == 9 * BLOCK
    assert charges.growth(sparse, 1 << 60, 0) > 1 << 59
    assert charges.growth(dense, 0, 0) == 0


def test_an_inode_number_that_is_used_again_brings_nothing_along() -> None:
    """The host has removed the guest's file, and made a large one that happens to have its number."""
    charges = Charges()
    charges.add(attributes(0, 0))

    charges.settle(attributes(1 << 20, 1 << 20), attributes(1 << 20, 1 << 20))

    assert charges.used == BLOCK
