"""A directory of the host that is served by an ordinary user: what the host refuses is refused, with its own errno."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from tests.support.ordinary_user import as_ordinary_user, give

from taskvm.fs.conformance import ProviderConformance
from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.provider import ROOT, Node, Provider
from taskvm.fs.quota import Quota
from taskvm.fs.shadow import Shadow
from taskvm.wire.fuse import SetAttr, SetAttrField

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has files of another user")


class Served(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        return HostDir(directory)


class Composed(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        hidden = Shadow(HostDir(directory), [".env", "/keys/"], private=Memory())
        return Quota(hidden, limit_bytes=1 << 30, limit_files=10_000)


@pytest.mark.parametrize("suite", [Served, Composed])
def test_the_contract_is_kept_by_an_ordinary_user(suite: type[ProviderConformance]) -> None:
    def run() -> list[str]:
        return [
            name for name in dir(suite) if name.startswith("test_") and not passes(suite(), name)
        ]

    assert as_ordinary_user(run) == []


def passes(suite: ProviderConformance, name: str) -> bool:
    suite.setup_method()
    try:
        getattr(suite, name)()
    except (AssertionError, OSError):
        return False
    finally:
        suite.teardown_method()
    return True


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """What the serving user owns."""
    path = tmp_path / "host"
    (path / "unlisted" / "below").mkdir(parents=True)
    (path / "unlisted" / "below" / "file").write_text("data")
    (path / "closed").mkdir()
    (path / "closed" / "file").write_text("data")
    for name, mode in (("unreadable", 0o200), ("unwritable", 0o400), ("file", 0o600)):
        (path / name).write_text("data")
        (path / name).chmod(mode)
    for each in [path, *path.rglob("*")]:
        give(each)
    (path / "unlisted").chmod(0o300)
    (path / "closed").chmod(0o500)
    yield path
    for name in ("unlisted", "closed"):
        (path / name).chmod(0o700)


def answers(
    provider: Provider, attempts: Mapping[str, Callable[[], object]]
) -> dict[str, str | None]:
    """Return the name of the errno that answered each attempt, None where it was granted."""
    told: dict[str, str | None] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            told[name] = errno.errorcode[error.errno or 0]
        else:
            told[name] = None
    return told


def node_of(provider: Provider, path: str) -> Node:
    node = ROOT
    for name in path.split("/"):
        node = provider.lookup(node, name.encode()).node
    return node


def changed(field: SetAttrField, *, mode: int = 0, size: int = 0, uid: int = 0) -> SetAttr:
    return SetAttr(field, size, 1, 1, mode, uid, 0)


@pytest.mark.parametrize("wrap", [lambda each: each, lambda each: Shadow(each, [".env"])])
def test_modes_of_its_own_files_bind_the_user(
    host: Path, wrap: Callable[[Provider], Provider]
) -> None:
    value = wrap(HostDir(host))  # by root, who may reach it

    def ask() -> object:
        p = value.opened()
        unreadable, unwritable = node_of(p, "unreadable"), node_of(p, "unwritable")
        unlisted, closed = node_of(p, "unlisted"), node_of(p, "closed")
        told = answers(
            p,
            {
                "read what is unreadable": lambda: p.read(unreadable, 0, 9),
                "seek in it": lambda: p.seek(unreadable, 0, os.SEEK_DATA),
                "write to it": lambda: p.write(unreadable, 0, memoryview(b"more"), append=False),
                "sync it": lambda: p.fsync(unreadable, data_only=True),
                "read what is unwritable": lambda: p.read(unwritable, 0, 9),
                "write": lambda: p.write(unwritable, 0, memoryview(b"x"), append=False),
                "truncate": lambda: p.setattr(unwritable, changed(SetAttrField.SIZE)),
                "reserve": lambda: p.allocate(unwritable, 0, 1 << 20, 0),
                "copy to it": lambda: p.copy_range(unwritable, 0, unwritable, 0, 1),
                "attribute": lambda: p.setxattr(unwritable, b"user.a", b"1", 0),
                "list": lambda: p.readdir(unlisted, 0, 4096),
                "find below": lambda: p.read(node_of(p, "unlisted/below/file"), 0, 9),
                "make in it": lambda: (
                    p.unlink(unlisted, b"new")
                    if p.create(unlisted, b"new", 0o600, os.O_EXCL)
                    else None
                ),
                "make in what is closed": lambda: p.create(closed, b"new", 0o600, 0),
                "remove from it": lambda: p.unlink(closed, b"file"),
                "move out of it": lambda: p.rename(closed, b"file", ROOT, b"out", 0),
                "move into it": lambda: p.rename(ROOT, b"file", closed, b"in", 0),
                "link into it": lambda: p.link(node_of(p, "file"), closed, b"in"),
                "open it": lambda: p.setattr(closed, changed(SetAttrField.MODE, mode=0o700)),
                "then make in it": lambda: p.create(closed, b"new", 0o600, 0),
            },
        )
        p.close()
        return told

    granted = {
        "write to it", "sync it", "read what is unwritable", "find below", "make in it", "open it", "then make in it",
    }  # fmt: skip
    told = as_ordinary_user(ask)

    assert isinstance(told, dict)
    assert {name for name, answer in told.items() if answer is None} == granted
    assert {answer for answer in told.values() if answer} == {"EACCES"}
    assert (host / "closed" / "new").exists()
    assert not (host / "closed" / "in").exists()


@needs_root
def test_what_belongs_to_another_user_stays_his(host: Path) -> None:
    for name, mode in (("secret", 0o600), ("shown", 0o644), ("program", 0o4777)):
        (host / name).write_text("root's")
        (host / name).chmod(mode)
    for name, mode in (("private", 0o700), ("public", 0o755), ("sticky", 0o1777)):
        (host / name).mkdir()
        (host / name / "file").write_text("root's")
        (host / name).chmod(mode)
    value = HostDir(host)

    def ask() -> object:
        p = value.opened()
        secret, shown, program = (node_of(p, name) for name in ("secret", "shown", "program"))
        private, public, sticky = (node_of(p, name) for name in ("private", "public", "sticky"))
        told = answers(
            p,
            {
                "read shown": lambda: p.read(shown, 0, 9),
                "list public": lambda: p.readdir(public, 0, 4096),
                "write program": lambda: p.write(program, 0, memoryview(b"x"), append=False),
                "make in sticky": lambda: p.create(sticky, b"new", 0o600, 0),
                "EACCES read": lambda: p.read(secret, 0, 9),
                "EACCES write": lambda: p.write(shown, 0, memoryview(b"x"), append=True),
                "EACCES truncate": lambda: p.setattr(shown, changed(SetAttrField.SIZE)),
                "EACCES create over": lambda: p.create(ROOT, b"secret", 0o600, os.O_TRUNC),
                "EACCES list": lambda: p.readdir(private, 0, 4096),
                "EACCES find": lambda: p.lookup(private, b"file"),
                "EACCES make": lambda: p.mkdir(public, b"new", 0o700),
                "EACCES remove": lambda: p.unlink(public, b"file"),
                "EPERM chmod": lambda: p.setattr(shown, changed(SetAttrField.MODE, mode=0o666)),
                "EPERM times": lambda: p.setattr(shown, changed(SetAttrField.MTIME)),
                "EPERM chown": lambda: p.setattr(shown, changed(SetAttrField.UID, uid=os.getuid())),
                "EPERM remove from sticky": lambda: p.unlink(sticky, b"file"),
                "EPERM move out": lambda: p.rename(sticky, b"file", ROOT, b"out", 0),
            },
        )
        p.close()
        return told

    told = as_ordinary_user(ask)

    assert isinstance(told, dict)
    for name, answer in told.items():
        expected = name.split()[0] if name.startswith("E") else None
        assert answer == expected, name
    assert not (host / "program").stat().st_mode & 0o6000  # written by who is not its owner
    for name in ("secret", "shown", "private/file", "public/file", "sticky/file"):
        assert (host / name).read_text() == "root's"


def test_a_directory_that_the_user_may_not_list_hides_no_other_file(host: Path) -> None:
    """Looking for hard links of hidden files leaves it out, for the guest may not list it either."""
    (host / ".env").write_text("secret")
    for name, linked in (("file", "again"), (".env", "leak")):
        os.link(host / name, host / linked)
    give(host / ".env")
    value = Shadow(HostDir(host), [".env", "/keys/below"])

    def ask() -> object:
        p = value.opened()
        told = answers(
            p,
            {
                "again": lambda: p.read(node_of(p, "again"), 0, 9),
                "leak": lambda: p.read(node_of(p, "leak"), 0, 9),
                "move": lambda: p.rename(ROOT, b"unlisted", ROOT, b"keys", 0),
            },
        )
        p.close()
        return told

    assert as_ordinary_user(ask) == {"again": None, "leak": "ENOENT", "move": "EACCES"}
