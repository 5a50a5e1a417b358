"""taskvm.fs.ahead: what is pushed into a guest's page cache, and that it is what the guest would have read."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from tests.support.kernel_mount import KernelMount
from tests.support.waiting import PATIENCE_S

from taskvm.fs import ahead as ahead_module
from taskvm.fs.ahead import FIRST_FILES, MAX_SIZE, Ahead
from taskvm.fs.hostdir import HostDir
from taskvm.fs.provider import Provider
from taskvm.fs.shadow import Shadow
from taskvm.wire.fuse_replies import Attr

Mount = Callable[[Provider], KernelMount]


def attr(size: int, kind: int = stat.S_IFREG) -> Attr:
    return cast("Attr", SimpleNamespace(st_mode=kind | 0o644, st_size=size))


def listed(ahead: Ahead, directory: int, files: range, size: int = 10) -> None:
    ahead.listing(directory)
    for node in files:
        ahead.listed(directory, node, attr(size))


def test_nothing_is_pushed_before_the_second_file_is_read() -> None:
    ahead = Ahead()
    listed(ahead, 1, range(100, 200))

    assert ahead.read(100) == []
    assert ahead.read(101) == [(node, 10) for node in range(102, 102 + FIRST_FILES)]


def test_more_is_pushed_each_time_and_nothing_twice() -> None:
    ahead = Ahead()
    listed(ahead, 1, range(100, 1000))
    ahead.read(100)

    pushed = [node for node, _size in ahead.read(101)]
    pushed += [node for node, _size in ahead.read(max(pushed) + 1)]

    assert len(pushed) == len(set(pushed)) == 3 * FIRST_FILES
    assert ahead.read(pushed[0]) == []


def test_only_small_regular_files_are_pushed() -> None:
    ahead = Ahead()
    listed(ahead, 1, range(100, 102))
    for node, one in ((102, attr(0)), (103, attr(MAX_SIZE + 1)), (104, attr(5, stat.S_IFLNK))):
        ahead.listed(1, node, one)
    ahead.read(100)

    assert ahead.read(101) == []


def test_one_push_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "MOST_BYTES", 35)
    ahead = Ahead()
    listed(ahead, 1, range(100, 200))
    ahead.read(100)

    assert len(ahead.read(101)) == 3


def test_a_guest_makes_the_host_remember_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "MAX_DIRECTORIES", 4)
    monkeypatch.setattr(ahead_module, "MAX_FILES", 10)
    ahead = Ahead()
    for directory in range(1, 100):
        listed(ahead, directory, range(directory * 1000, directory * 1000 + 50))

    assert len(ahead._listings) == 4
    assert len(ahead._where) == 40


def test_a_directory_that_is_read_through_is_pushed(kernel_mount: Mount, host: Path) -> None:
    """Every byte is right, and most files are never asked for."""
    for number in range(300):
        (host / f"file{number}").write_text(f"{number}\n" * (number + 1))
    mount = kernel_mount(HostDir(host, mode="ro"))

    found = {}
    for path in mount.path.iterdir():
        found[path.name] = path.read_text()
        mount.settle()

    assert found == {f"file{n}": f"{n}\n" * (n + 1) for n in range(300)}
    assert mount.requests["READ"] < 150


def test_what_the_host_changes_after_the_push_shows(kernel_mount: Mount, host: Path) -> None:
    """It is as good as read."""
    for number in range(10):
        (host / f"file{number}").write_text("old")
    mount = kernel_mount(HostDir(host, mode="ro"))
    names = [path.name for path in mount.path.iterdir()]
    for name in names[:2]:
        (mount.path / name).read_text()
    mount.settle()

    (host / names[5]).write_text("new")

    deadline = time.monotonic() + PATIENCE_S
    while (mount.path / names[5]).read_text() != "new":
        assert time.monotonic() < deadline


def test_nothing_is_pushed_to_who_can_write(kernel_mount: Mount, host: Path) -> None:
    """A page that a program has changed through a mapping would be lost."""
    for number in range(50):
        (host / f"file{number}").write_text("text")
    mount = kernel_mount(HostDir(host))

    for path in mount.path.iterdir():
        path.read_text()

    assert mount.told == 0


def test_what_is_hidden_is_not_pushed(kernel_mount: Mount, host: Path) -> None:
    """The server asks the provider for it as the guest would."""
    for number in range(50):
        (host / f"file{number}").write_text("shown")
        (host / f"secret{number}").write_text("hidden")
    mount = kernel_mount(Shadow(HostDir(host, mode="ro"), ["secret*"]))

    for path in mount.path.iterdir():
        assert path.read_text() == "shown"
        mount.settle()

    assert any(b"shown" in message for message in mount.messages)
    assert not any(b"hidden" in message or b"secret" in message for message in mount.messages)
