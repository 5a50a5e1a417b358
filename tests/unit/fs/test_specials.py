"""FIFOs and sockets that exist for the guest only."""

from __future__ import annotations

import errno
import stat

import pytest

from taskvm.fs import specials as specials_module
from taskvm.fs.nodes import identity
from taskvm.fs.specials import FIRST_OFFSET, Specials

DIRECTORY = (9, 1, stat.S_IFDIR, 0)
OTHER = (9, 2, stat.S_IFDIR, 0)


def test_names_are_kept_by_directory() -> None:
    specials = Specials()
    fifo = specials.make(DIRECTORY, b"a", stat.S_IFIFO)

    assert specials.get(DIRECTORY, b"a") is fifo
    assert specials.get(OTHER, b"a") is None
    assert (specials.within(DIRECTORY), specials.within(OTHER)) == (True, False)
    specials.move(DIRECTORY, b"a", OTHER, b"b")
    assert specials.get(OTHER, b"b") is fifo
    assert not specials.within(DIRECTORY)


def test_one_without_a_name_lives_until_it_is_forgotten() -> None:
    specials = Specials()
    fifo = specials.make(DIRECTORY, b"a", stat.S_IFIFO)
    specials.forget(identity(fifo))
    assert specials.known(identity(fifo)) is fifo

    assert specials.remove(DIRECTORY, b"a")
    assert not specials.remove(DIRECTORY, b"a")
    assert specials.known(identity(fifo)) is fifo
    specials.forget(identity(fifo))
    assert specials.known(identity(fifo)) is None


def test_a_listing_can_be_resumed_after_each() -> None:
    specials = Specials()
    for name in (b"a", b"b", b"c"):
        specials.make(DIRECTORY, name, stat.S_IFSOCK)
    entries = specials.list(DIRECTORY, FIRST_OFFSET)
    assert [entry.name for entry in entries] == [b"a", b"b", b"c"]
    specials.remove(DIRECTORY, b"a")
    assert specials.list(DIRECTORY, entries[0].offset) == entries[1:]
    assert specials.list(DIRECTORY, entries[2].offset) == []


def test_their_number_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specials_module, "MAX_SPECIALS", 1)
    specials = Specials()
    specials.make(DIRECTORY, b"a", stat.S_IFIFO)
    with pytest.raises(OSError, match="ENOSPC") as caught:
        specials.make(DIRECTORY, b"b", stat.S_IFIFO)
    assert caught.value.errno == errno.ENOSPC
