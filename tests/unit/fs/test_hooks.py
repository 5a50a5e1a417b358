"""taskvm.fs.hooks: operations are seen, changed and refused, data included."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from tests.unit.fs.test_wrapper import OPERATIONS

from taskvm.fs.hooks import Hooks, Operation
from taskvm.fs.memory import Memory
from taskvm.fs.provider import ROOT, Node, Provider
from taskvm.fs.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from taskvm.fs.tracked import Tracked
from taskvm.wire.fuse import SetAttr, SetAttrField

PAGE = Path(__file__).parents[3] / "docs" / "files.md"


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


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"forget", "sync_later"}))
def test_no_operation_goes_by_unseen(name: str) -> None:
    """But forget, which no program asks for and nobody may refuse; and what a wrapper leaves to fsync."""
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


def test_flags_and_changes_can_be_changed() -> None:
    def change(asked: Operation) -> Operation | None:
        if asked.name == "create" and asked.flags is not None:
            return msgspec.structs.replace(asked, flags=asked.flags & ~os.O_EXCL)
        if asked.name == "rename":
            return msgspec.structs.replace(asked, flags=RENAME_NOREPLACE)
        if asked.changes is not None:
            kept = msgspec.structs.replace(asked.changes, mode=asked.changes.mode & 0o755)
            return msgspec.structs.replace(asked, changes=kept)
        return None

    hooks = Hooks(Memory(), before=change)
    file = make(hooks, b"file", b"data")

    assert hooks.create(ROOT, b"file", 0o644, os.O_EXCL).node == file
    attr, _ = hooks.setattr(file, SetAttr(SetAttrField.MODE, 0, 0, 0, 0o777, 0, 0))
    assert attr.st_mode & 0o777 == 0o755
    make(hooks, b"there", b"")
    with pytest.raises(FileExistsError):
        hooks.rename(ROOT, b"file", ROOT, b"there", 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"path": "/x"},
        {"other": "/x"},
        {"name": "read"},
        {"offset": 9},
        {"size": 9},
        {"mode": 0o600},
    ],
    ids=str,
)
def test_what_cannot_be_changed_is_a_mistake(changed: dict[str, object]) -> None:
    """A hook that believes to have redirected a write must not be ignored."""

    def change(asked: Operation) -> Operation | None:
        return msgspec.structs.replace(asked, **changed) if asked.name == "write" else None

    memory = Memory()
    with pytest.raises(ValueError, match=f"changed the {next(iter(changed))} of write"):
        make(Hooks(memory, before=change), b"file", b"data")
    assert memory.read(memory.lookup(ROOT, b"file").node, 0, 10) == b""


# The example of the page on files...


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Provider]:
    """A repository behind the page's own example, as it stands there."""
    (tmp_path / ".git" / "hooks").mkdir(parents=True)
    (tmp_path / ".git" / "hooks" / "pre-commit").write_text("the host's")
    (tmp_path / ".git" / "info").mkdir()
    (tmp_path / "evil").write_text("the guest's")
    (tmp_path / "tree" / "hooks").mkdir(parents=True)
    (tmp_path / "tree" / "hooks" / "pre-commit").write_text("the guest's")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(next(block for block in blocks if "def guard" in block), names)
    served = names["mounts"]["/workspace"].opened()  # type: ignore[index]
    yield served
    served.close()


def node_of(provider: Provider, path: str) -> Node:
    node = ROOT
    for name in path.split("/"):
        node = provider.lookup(node, name.encode()).node
    return node


def test_the_guard_of_the_page_on_files_cannot_be_gone_around(
    guarded: Provider, tmp_path: Path
) -> None:
    """By a move onto a hook, of a hook, of the directory or of one above it; by an exchange, a link or a write."""
    git, hooks, tree = (node_of(guarded, path) for path in (".git", ".git/hooks", "tree"))
    evil, hook = node_of(guarded, "evil"), node_of(guarded, ".git/hooks/pre-commit")
    attempts: list[Callable[[], object]] = [
        lambda: guarded.write(hook, 0, memoryview(b"x"), append=False),
        lambda: guarded.setattr(hook, SetAttr(SetAttrField.MODE, 0, 0, 0, 0o777, 0, 0)),
        lambda: guarded.create(hooks, b"post-commit", 0o755, 0),
        lambda: guarded.symlink(hooks, b"post-commit", b"../../evil"),
        lambda: guarded.unlink(hooks, b"pre-commit"),
        lambda: guarded.link(evil, hooks, b"post-commit"),
        lambda: guarded.link(hook, ROOT, b"way-in"),
        lambda: guarded.copy_range(evil, 0, hook, 0, 11),
        lambda: guarded.rename(git, b"hooks", git, b"away", 0),
        lambda: guarded.rename(ROOT, b".git", ROOT, b"away", 0),
        *(
            lambda names=names, flags=flags: guarded.rename(*names, flags)
            for names in (
                (ROOT, b"evil", hooks, b"pre-commit"),
                (hooks, b"pre-commit", ROOT, b"evil"),
                (tree, b"hooks", git, b"hooks"),
                (git, b"hooks", tree, b"hooks"),
                (ROOT, b"tree", ROOT, b".git"),
                (ROOT, b".git", ROOT, b"tree"),
            )
            for flags in (0, RENAME_EXCHANGE)
        ),
    ]

    for attempt in attempts:
        with pytest.raises(OSError, match="not yours"):
            attempt()

    assert (tmp_path / ".git" / "hooks" / "pre-commit").read_text() == "the host's"
    assert [path.name for path in (tmp_path / ".git" / "hooks").iterdir()] == ["pre-commit"]


def test_the_guard_of_the_page_on_files_lets_everything_else_happen(guarded: Provider) -> None:
    git, hook = node_of(guarded, ".git"), node_of(guarded, ".git/hooks/pre-commit")

    assert guarded.read(hook, 0, 20) == b"the host's"
    assert guarded.create(git, b"hooks.sample", 0o644, 0)
    assert guarded.copy_range(hook, 0, node_of(guarded, "evil"), 0, 3) == 3
    guarded.rename(ROOT, b"evil", git, b"index", 0)
    guarded.rename(git, b"info", git, b"renamed", 0)
    guarded.write(node_of(guarded, ".git/index"), 0, memoryview(b"an internal"), append=False)
    assert guarded.read(node_of(guarded, ".git/index"), 0, 20) == b"an ********"
