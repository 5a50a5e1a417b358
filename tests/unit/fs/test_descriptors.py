"""The sets of descriptors, and the account that they share."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm.fs.descriptors import (
    LEAST,
    Account,
    DescriptorSet,
    Held,
    Pins,
    kept_limit,
    pinned_limit,
)


@pytest.fixture
def kept() -> Iterator[DescriptorSet]:
    descriptors = DescriptorSet(Account(lambda: 0))
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
    held = [opened() for _ in range(LEAST + 1)]
    for number, one in enumerate(held[:-1]):
        assert kept.put(number, one) == []
    kept.get(0)

    assert kept.put(LEAST, held[-1]) == [(1, held[1])]

    assert [is_open(one) for one in held] == [True, False, *[True] * (LEAST - 1)]
    assert kept.get(1) is None
    assert len(kept) == LEAST


def test_a_new_one_closes_the_one_before(kept: DescriptorSet) -> None:
    first, second = opened(), opened()
    kept.put(1, first)
    assert kept.put(1, second) == [(1, first)]
    assert (is_open(first), is_open(second)) == (False, True)
    assert kept.drop(1) == second
    assert kept.drop(1) is None
    assert not is_open(second)


def test_closing_closes_all(kept: DescriptorSet) -> None:
    held = [opened(), opened()]
    for number, one in enumerate(held):
        kept.put(number, one)
    kept.close()
    assert [is_open(one) for one in held] == [False, False]


def test_sets_share_what_there_is_and_leave_some_for_the_next() -> None:
    account = Account(lambda: 60)
    sets = [DescriptorSet(account) for _ in range(3)]
    sizes = []
    for one in sets:
        for number in range(100):
            one.put(number, opened())
        sizes.append([len(each) for each in sets])
    assert sizes == [[30, 0, 0], [30, 15, 0], [30, 15, 7]]

    sets[0].put(100, opened())  # who had more than its share gives it back with the next one

    assert [len(each) for each in sets] == [19, 15, 7]
    for one in sets:
        one.close()
    assert account.total == 0


def test_what_cannot_be_opened_again_is_never_closed_for_another() -> None:
    pins = Pins(Account(lambda: 20))
    held = [opened() for _ in range(11)]
    for number, one in enumerate(held[:10]):
        pins.put(number, one)

    with pytest.raises(OSError, match="ENFILE") as caught:
        pins.put(10, held[10])

    assert caught.value.errno == errno.ENFILE
    assert [is_open(one) for one in held] == [True] * 10 + [False]
    assert pins.drop(3) == held[3]
    pins.put(10, opened())
    pins.close()


@pytest.mark.parametrize(
    ("soft", "hard", "kept", "pinned"),
    [
        (256, 256, 64, 64),
        (1024, 4096, 256, 1024),
        (1 << 20, 1 << 20, 8192, 1 << 16),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 8192, 1 << 16),
    ],
)
def test_the_limits_are_shares_of_those_of_the_process(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, kept: int, pinned: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    assert (kept_limit(), pinned_limit()) == (kept, pinned)


_UNLINKED = """
import errno, os, pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))
from taskvm.fs.hostdir import HostDir
providers = [HostDir(sys.argv[1]) for _ in range(8)]
def keep(provider):
    for number in range(2000):
        try:
            node = provider.create(1, b"file", 0o600, 0).node
            provider.write(node, 0, memoryview(b"%d" % number), append=False)
            provider.unlink(1, b"file")
        except OSError as error:
            assert error.errno == errno.ENFILE, error
            assert os.listdir(sys.argv[1]) == ["file"]  # nothing was lost
            os.unlink(sys.argv[1] + "/file")
            return kept
        kept[provider].append(node)
kept = {provider: [] for provider in providers}
for provider in providers:
    keep(provider)
for provider, nodes in kept.items():
    for number, node in enumerate(nodes):
        assert provider.read(node, 0, 99) == b"%d" % number
        provider.forget(node, 1)
print(*map(len, kept.values()), len(os.listdir("/proc/self/fd")))
"""


def test_unlinked_files_are_kept_until_the_guest_forgets_them(tmp_path: Path) -> None:
    """However many, and what one guest keeps leaves room for the others and for the program."""
    program = [sys.executable, "-c", _UNLINKED, str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr

    *kept, files = map(int, done.stdout.split())

    assert kept == [256, 128, 64, 32, 16, 8, 4, 4]
    assert files < 256


def test_what_close_has_to_say_is_nobodys_error(
    kept: DescriptorSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS tells close(2) of a full disk; fsync tells it to whom it concerns."""
    asked: list[int] = []

    def close(fd: int) -> None:
        asked.append(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("taskvm.fs.descriptors.os.close", close)
    for number in range(LEAST + 1):
        kept.put(number, Held(1001 + number))
    kept.drop(2)
    kept.close()

    assert sorted(asked) == list(range(1001, 1002 + LEAST))
