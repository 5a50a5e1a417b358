"""taskvm.fs.wrapper, and taskvm.fs.readonly on it: what is forwarded, and what is not."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from taskvm.errors import UsageError
from taskvm.fs.hooks import Hooks
from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.provider import ROOT, Change, Provider
from taskvm.fs.quota import Quota
from taskvm.fs.readonly import ReadOnly
from taskvm.fs.router import Router
from taskvm.fs.session import _CHANGING
from taskvm.fs.shadow import Shadow
from taskvm.fs.tracked import Tracked
from taskvm.fs.wrapper import Wrapper
from taskvm.wire.fuse import SetAttr

CONTRACT = sorted(name for name in vars(Provider) if not name.startswith("_"))
# That take a node or a name, so that a wrapper which keeps nodes from the guest must look at them.
OPERATIONS = [
    name
    for name in CONTRACT
    if inspect.isfunction(vars(Provider)[name])
    and set(inspect.signature(vars(Provider)[name]).parameters) & {"node", "parent"}
]
CHANGING = [
    "create",
    "mknod",
    "mkdir",
    "symlink",
    "link",
    "unlink",
    "rmdir",
    "rename",
    "setattr",
    "setxattr",
    "removexattr",
    "write",
    "allocate",
    "copy_range",
]


@pytest.mark.parametrize("name", CONTRACT)
def test_everything_in_the_contract_is_forwarded(name: str) -> None:
    """Whoever adds to the contract adds here, and thinks of those that restrict something."""
    assert name in vars(Wrapper)


@pytest.mark.parametrize("name", OPERATIONS)
def test_everything_that_takes_a_node_is_asked_for_its_place(name: str) -> None:
    assert name in vars(Tracked)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReadOnly("/src"),  # type: ignore[arg-type]  # the mistake, here and below
        lambda: Shadow("/src", [".env"]),  # type: ignore[arg-type]  # the same
        lambda: Quota("/src", limit_bytes=1),  # type: ignore[arg-type]  # the same
        lambda: Hooks("/src"),  # type: ignore[arg-type]  # the same
        lambda: Router({"/": "/src"}),  # type: ignore[dict-item]  # the same
    ],
)
def test_a_path_in_the_place_of_a_provider_is_told(make: Callable[[], object]) -> None:
    """Before a guest waits for it."""
    with pytest.raises(UsageError, match=r"Write HostDir\('/src'\)"):
        make()


def test_each_mount_is_served_by_itself() -> None:
    wrapper = Wrapper(Memory())

    first, second = wrapper.opened(), wrapper.opened()
    first.mkdir(ROOT, b"only here", 0o755)

    assert len(second.readdir(ROOT, 0, 4096)) == 2


def test_what_the_inner_provider_learns_is_told() -> None:
    memory, told = Memory(), list[Change]()
    Wrapper(memory).changes = told.append

    memory.changes(Change(ROOT, b"name"))

    assert told == [Change(ROOT, b"name")]


def test_a_read_only_provider_reads_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("data")
    served = ReadOnly(HostDir(tmp_path)).opened()
    file = served.lookup(ROOT, b"file").node

    arguments = {
        "create": (ROOT, b"file", 0o644, os.O_TRUNC),
        "mknod": (ROOT, b"new", 0o644),
        "mkdir": (ROOT, b"new", 0o755),
        "symlink": (ROOT, b"new", b"target"),
        "link": (file, ROOT, b"new"),
        "unlink": (ROOT, b"file"),
        "rmdir": (ROOT, b"file"),
        "rename": (ROOT, b"file", ROOT, b"new", 0),
        "setattr": (file, SetAttr(1, 0, 0, 0, 0, 0, 0)),
        "setxattr": (file, b"user.a", b"", 0),
        "removexattr": (file, b"user.a"),
        "allocate": (file, 0, 10, 0),
        "write": (file, 0, memoryview(b"x")),
        "copy_range": (file, 0, file, 4, 4),
    }
    for name in CHANGING:
        keywords = {"append": False} if name == "write" else {}
        with pytest.raises(OSError, match="EROFS"):
            getattr(served, name)(*arguments[name], **keywords)

    assert served.readonly
    assert served.read(file, 0, 10) == b"data"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "data"
    served.close()


def test_everything_that_the_server_takes_for_a_change_is_refused() -> None:
    """RENAME2 and COPY_FILE_RANGE are rename and copy_range; the other opcodes have their method's name."""
    spelled = {"RENAME2": "rename", "COPY_FILE_RANGE": "copy_range", "FALLOCATE": "allocate"}
    asked = {spelled.get(opcode.name, opcode.name.lower()) for opcode in _CHANGING}

    assert asked == set(CHANGING)
    assert asked <= set(vars(ReadOnly))
