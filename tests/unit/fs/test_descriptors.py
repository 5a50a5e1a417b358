"""The bounded set of descriptors."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator

import pytest

from taskvm.fs.descriptors import DescriptorSet, Held, descriptor_budget


@pytest.fixture
def kept() -> Iterator[DescriptorSet]:
    descriptors = DescriptorSet(2)
    yield descriptors
    descriptors.close()


def opened() -> Held:
    return Held(os.open("/dev/null", os.O_RDONLY))


def is_open(held: Held) -> bool:
    try:
        os.fstat(held.fd)
    except OSError:
        return False
    return True


def test_the_one_not_used_for_longest_goes_first(kept: DescriptorSet) -> None:
    first, second, third = opened(), opened(), opened()
    kept.put(1, first)
    kept.put(2, second)
    kept.get(1)
    kept.put(3, third)

    assert [is_open(held) for held in (first, second, third)] == [True, False, True]
    assert kept.get(2) is None
    assert len(kept) == 2


def test_a_new_one_closes_the_one_before(kept: DescriptorSet) -> None:
    first, second = opened(), opened()
    kept.put(1, first)
    kept.put(1, second)
    assert (is_open(first), is_open(second)) == (False, True)
    kept.drop(1)
    kept.drop(1)
    assert not is_open(second)


def test_closing_closes_all(kept: DescriptorSet) -> None:
    held = [opened(), opened()]
    for number, one in enumerate(held):
        kept.put(number, one)
    kept.close()
    assert [is_open(one) for one in held] == [False, False]


@pytest.mark.parametrize(
    ("limit", "budget"),
    [(256, 32), (1024, 64), (1 << 20, 2048), (resource.RLIM_INFINITY, 2048)],
)
def test_the_budget_is_a_share_of_the_process(
    monkeypatch: pytest.MonkeyPatch, limit: int, budget: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert descriptor_budget() == budget


def test_what_close_has_to_say_is_nobodys_error(
    kept: DescriptorSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS tells close(2) of a full disk; fsync tells it to whom it concerns."""
    asked: list[int] = []

    def close(fd: int) -> None:
        asked.append(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("taskvm.fs.descriptors.os.close", close)
    kept.put(1, Held(1001))
    kept.put(2, Held(1002))
    kept.put(3, Held(1003))
    kept.drop(2)
    kept.close()

    assert sorted(asked) == [1001, 1002, 1003]
