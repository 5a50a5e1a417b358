"""taskvm.fs.attention: sources that are always readable do not keep a thread from its own work."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm.fs import attention as attention_module
from taskvm.fs.attention import Attention, Pauses
from taskvm.fs.provider import Source


@pytest.fixture
def own() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def attention(own: tuple[socket.socket, socket.socket]) -> Iterator[Attention]:
    attention = Attention(own[0].fileno())
    yield attention
    attention.close()


@pytest.fixture
def storm() -> Iterator[Source]:
    """A source that is readable for ever."""
    reading, writing = os.pipe()
    os.write(writing, b"x")
    yield Source(reading, lambda: None)
    os.close(reading)
    os.close(writing)


def test_nothing_is_ready_when_the_time_is_over(attention: Attention) -> None:
    assert attention.wait(0.01) == (False, [])


def test_both_kinds_are_told(
    attention: Attention, own: tuple[socket.socket, socket.socket], storm: Source
) -> None:
    attention.watch([storm])
    attention.watch([storm])
    assert attention.wait(None) == (False, [storm])
    own[1].send(b"x")
    assert attention.wait(None) == (True, [storm])
    assert attention.is_watched(storm)

    attention.unwatch([storm])
    attention.unwatch([storm])
    assert attention.wait(None) == (True, [])
    assert not attention.is_watched(storm)


def test_a_source_that_takes_long_is_left_alone_and_heard_again(
    attention: Attention, own: tuple[socket.socket, socket.socket], storm: Source
) -> None:
    attention.watch([storm])
    own[1].send(b"x")
    begun = time.monotonic()
    attention.spent(10.0)

    while attention.wait(None) == (True, []):
        assert time.monotonic() - begun < PATIENCE_S

    assert attention.wait(None) == (True, [storm])
    assert time.monotonic() - begun >= 0.05


def test_waiting_ends_for_a_source_that_has_rested(attention: Attention, storm: Source) -> None:
    """Without a limit, and although nothing else happens."""
    attention.watch([storm])
    attention.spent(0.01)
    assert attention.wait(None) == (False, [storm])


def test_what_takes_no_time_is_always_heard(attention: Attention, storm: Source) -> None:
    attention.watch([storm])
    attention.spent(0.0001)
    assert attention.wait(0) == (False, [storm])


def test_there_is_a_pause_in_each_second_with_requests_and_one_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(attention_module, "time", clock)
    pauses = Pauses(1.0)
    assert (pauses.left_s, pauses.is_due()) == (None, False)

    due = []
    for clock.now in (100.0, 100.5, 101.0, 101.25, 102.0):
        due.append(pauses.is_due())
        pauses.asked()
    assert due == [False, False, True, False, True]
    for clock.now, left_s, is_due in ((102.5, 0.5, False), (103.5, 0.0, True), (104.0, 0.5, False)):
        assert (pauses.left_s, pauses.is_due()) == (left_s, is_due)
    clock.now = 105.0
    assert pauses.is_due()
    assert (pauses.left_s, pauses.is_due()) == (None, False)
