"""taskvm.fs.hooks: operations are seen, changed and refused, data included."""

from __future__ import annotations

import errno
import os

import msgspec
import pytest
from tests.unit.fs.test_wrapper import OPERATIONS

from taskvm.fs.hooks import Hooks, Operation
from taskvm.fs.memory import Memory
from taskvm.fs.provider import ROOT, Node
from taskvm.fs.tracked import Tracked


def make(hooks: Hooks, name: bytes, data: bytes) -> Node:
    node = hooks.create(ROOT, name, 0o644, os.O_EXCL).node
    hooks.write(node, 0, memoryview(data), append=False)
    return node


def test_every_operation_is_seen_with_its_path() -> None:
    seen: list[tuple[str, str, str | None]] = []
    hooks = Hooks(
        Memory(), before=lambda asked: seen.append((asked.name, asked.path, asked.other))
    ).opened()

    directory = hooks.mkdir(ROOT, b"d", 0o755).node
    file = make(hooks, b"f", b"data")
    hooks.rename(ROOT, b"f", directory, b"g", 0)
    hooks.read(file, 0, 10)
    hooks.unlink(directory, b"g")
    hooks.getattr(file)

    assert seen == [
        ("mkdir", "/d", None),
        ("create", "/f", None),
        ("write", "/f", None),
        ("rename", "/f", "/d/g"),
        ("read", "/d/g", None),
        ("unlink", "/d/g", None),
        ("getattr", "/d/g", None),
    ]


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"forget"}))
def test_no_operation_goes_by_unseen(name: str) -> None:
    """But forget, which no program asks for and nobody may refuse."""
    assert name in vars(Hooks)
    assert vars(Hooks)[name] is not vars(Tracked)[name]


def test_what_is_refused_does_not_happen() -> None:
    def guard(asked: Operation) -> None:
        if asked.path.startswith("/.git/") and asked.name in ("create", "write"):
            raise PermissionError(errno.EACCES, "EACCES")

    memory = Memory()
    hooks = Hooks(memory, before=guard)
    git = hooks.mkdir(ROOT, b".git", 0o755).node

    with pytest.raises(PermissionError):
        hooks.create(git, b"hook", 0o755, 0)
    assert len(memory.readdir(git, 0, 4096)) == 2


def test_what_is_written_and_read_can_be_changed() -> None:
    def rotate(asked: Operation) -> Operation | None:
        if asked.name != "write":
            return None
        return msgspec.structs.replace(asked, data=(asked.data or b"").upper())

    memory = Memory()
    hooks = Hooks(
        memory,
        before=rotate,
        after=lambda _asked, data: data and data.replace(b"SECRET", b"******"),
    )
    file = make(hooks, b"file", b"a secret")

    assert memory.read(file, 0, 20) == b"A SECRET"
    assert hooks.read(file, 0, 20) == b"A ******"


def test_what_was_read_can_be_kept_back() -> None:
    def keep(asked: Operation, data: bytes | None) -> None:
        if data is not None and b"PRIVATE KEY" in data:
            raise PermissionError(errno.EACCES, "EACCES")

    hooks = Hooks(Memory(), after=keep)
    file = make(hooks, b"file", b"-----BEGIN PRIVATE KEY-----")

    with pytest.raises(PermissionError):
        hooks.read(file, 0, 100)


def test_modes_and_targets_can_be_changed() -> None:
    def change(asked: Operation) -> Operation | None:
        if asked.name == "symlink":
            return msgspec.structs.replace(asked, data=b"elsewhere")
        return msgspec.structs.replace(asked, mode=0o600) if asked.mode is not None else None

    hooks = Hooks(Memory(), before=change)

    assert hooks.create(ROOT, b"file", 0o777, 0).attr.st_mode & 0o777 == 0o600
    assert hooks.readlink(hooks.symlink(ROOT, b"link", b"target").node) == b"elsewhere"


@pytest.mark.parametrize("data", [b"longer than it was", b"", None])
def test_a_write_cannot_change_its_length(data: bytes | None) -> None:
    def change(asked: Operation) -> Operation | None:
        return msgspec.structs.replace(asked, data=data) if asked.name == "write" else None

    memory = Memory()
    with pytest.raises(ValueError, match="hook"):
        make(Hooks(memory, before=change), b"file", b"data")
    assert memory.read(memory.lookup(ROOT, b"file").node, 0, 10) == b""


def test_a_hook_hands_out_no_more_than_was_asked_for() -> None:
    hooks = Hooks(Memory(), after=lambda asked, _data: b"x" * 100 if asked.name == "read" else None)
    file = make(hooks, b"file", b"data")

    with pytest.raises(ValueError, match="more than"):
        hooks.read(file, 0, 10)


def test_bytes_for_what_has_none_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="mkdir"):
        Hooks(Memory(), after=lambda _asked, _data: b"x").mkdir(ROOT, b"d", 0o755)
