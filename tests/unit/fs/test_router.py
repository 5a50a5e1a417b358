"""taskvm.fs.router: several providers in one tree (taskvm.fs.divided; their attributes are taskvm.fs.attributes)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taskvm.errors import UsageError
from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.provider import ROOT, Change, Node, Provider
from taskvm.fs.readonly import ReadOnly
from taskvm.fs.router import Router
from taskvm.fs.shadow import Shadow
from taskvm.fs.syscalls import RENAME_EXCHANGE


@pytest.fixture
def host(tmp_path: Path) -> Path:
    path = tmp_path / "host"
    (path / "src" / "gen").mkdir(parents=True)
    (path / "src" / "main.py").write_text("main")
    (path / "src" / "gen" / "covered").write_text("covered")
    (path / "file").write_text("file")
    return path


@pytest.fixture
def router(host: Path) -> Iterator[Provider]:
    served = Router({"/": HostDir(host), "/src/gen": Memory(), "/deep/er/cache": Memory()}).opened()
    yield served
    served.close()


def names(provider: Provider, node: Node = ROOT) -> list[str]:
    listed, offset = [], 0
    while entries := provider.readdir(node, offset, 1024):
        listed += [os.fsdecode(entry.name) for entry in entries]
        offset = entries[-1].offset
    assert len(listed) == len(set(listed))
    return sorted(listed)


def find(provider: Provider, path: str) -> Node:
    node = ROOT
    for name in path.split("/"):
        node = provider.lookup(node, name.encode()).node
    return node


def failure(call: Callable[[], object]) -> int:
    with pytest.raises(OSError, match="E") as caught:
        call()
    return caught.value.errno or 0


def test_routes_show_above_what_is_there(router: Provider) -> None:
    assert names(router) == [".", "..", "deep", "file", "src"]
    assert names(router, find(router, "src")) == [".", "..", "gen", "main.py"]
    assert names(router, find(router, "src/gen")) == [".", ".."]
    assert names(router, find(router, "deep")) == [".", "..", "er"]


def test_each_path_is_served_by_its_own(router: Provider, host: Path) -> None:
    made = router.create(find(router, "src/gen"), b"new", 0o644, 0).node
    router.write(made, 0, memoryview(b"memory"), append=False)
    router.create(find(router, "src"), b"beside", 0o644, 0)

    assert router.read(find(router, "src/gen/new"), 0, 10) == b"memory"
    assert sorted(path.name for path in (host / "src").iterdir()) == ["beside", "gen", "main.py"]
    assert [path.name for path in (host / "src" / "gen").iterdir()] == ["covered"]
    assert not (host / "deep").exists()


def test_a_route_stays_where_it_is(router: Provider) -> None:
    src, gen = find(router, "src"), find(router, "src/gen")

    for attempt in (
        lambda: router.rmdir(src, b"gen"),
        lambda: router.unlink(src, b"gen"),
        lambda: router.rename(src, b"gen", ROOT, b"x", 0),
        lambda: router.rename(ROOT, b"file", src, b"gen", 0),
        lambda: router.rename(ROOT, b"file", src, b"gen", RENAME_EXCHANGE),
        lambda: router.rename(ROOT, b"src", ROOT, b"x", 0),
        lambda: router.rename(ROOT, b"deep", ROOT, b"x", 0),
    ):
        assert failure(attempt) == errno.EBUSY
    for attempt in (
        lambda: router.create(src, b"gen", 0o644, 0),
        lambda: router.mkdir(src, b"gen", 0o755),
        lambda: router.link(find(router, "file"), src, b"gen"),
    ):
        assert failure(attempt) == errno.EEXIST
    assert find(router, "src/gen") == gen


def test_nothing_crosses_from_one_to_another(router: Provider) -> None:
    gen, file = find(router, "src/gen"), find(router, "file")
    made = router.create(gen, b"made", 0o644, 0).node

    assert failure(lambda: router.rename(ROOT, b"file", gen, b"file", 0)) == errno.EXDEV
    assert failure(lambda: router.link(file, gen, b"file")) == errno.EXDEV
    assert failure(lambda: router.copy_range(file, 0, made, 0, 4)) == errno.EXDEV


def test_a_junction_without_a_directory_is_empty_and_takes_nothing(router: Provider) -> None:
    deep = find(router, "deep")

    assert failure(lambda: router.mkdir(deep, b"x", 0o755)) == errno.EROFS
    assert failure(lambda: router.lookup(deep, b"x")) == errno.ENOENT
    assert router.statfs(deep).max_name == 255


def test_a_junction_follows_what_the_host_does(router: Provider, host: Path) -> None:
    deep = find(router, "deep")
    (host / "deep").mkdir()
    (host / "deep" / "now").touch()
    assert names(router, deep) == [".", "..", "er", "now"]

    (host / "deep" / "now").unlink()
    (host / "deep").rmdir()
    (host / "deep").touch()
    assert names(router, deep) == [".", "..", "er"]


def test_a_link_of_the_host_at_a_junction_is_not_followed(router: Provider, host: Path) -> None:
    (host / "deep").symlink_to("/etc")

    assert names(router, find(router, "deep")) == [".", "..", "er"]


def test_what_a_route_covers_is_out_of_reach(router: Provider) -> None:
    """By a guessed number of the directory that a junction stands for, too."""
    find(router, "src/main.py")
    find(router, "deep/er/cache")

    for node in range(2, 60):
        try:
            below = router.lookup(router.lookup(node, b"gen").node, b"covered")
        except OSError:
            continue
        raise AssertionError(f"node {node} leads to {below}")
    assert failure(lambda: router.lookup(2, b"src")) == errno.ESTALE


def test_a_node_of_nobody_is_stale(router: Provider) -> None:
    for node in (0, 2, 7, 99, 2**40, 2**64 - 1):
        assert failure(lambda node=node: router.getattr(node)) == errno.ESTALE
        assert failure(lambda node=node: router.lookup(node, b"x")) == errno.ESTALE


def test_inode_numbers_of_different_providers_differ(tmp_path: Path) -> None:
    """rsync, tar and du would take two files for one otherwise."""
    router = Router({f"/m{number}": Memory() for number in range(5)}).opened()
    files = [router.create(find(router, f"m{n}"), b"f", 0o644, 0) for n in range(5)]

    assert len({file.attr.st_ino for file in files}) == 5
    assert len({file.node for file in files}) == 5
    router.close()


def test_the_provider_at_the_root_keeps_its_inode_numbers(tmp_path: Path) -> None:
    """Git believes its index on both sides then; no number of another provider is the same."""
    (tmp_path / "main.py").touch()
    own = (tmp_path / "main.py").stat().st_ino
    others = {"/cache": Memory(), "/other": HostDir(tmp_path), "/deep/er": Memory()}
    router = Router({"/": HostDir(tmp_path), **others}).opened()

    def number(path: str) -> int:
        return router.getattr(find(router, path))[0].st_ino

    router.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o600)
    router.mknod(find(router, "other"), b"fifo", stat.S_IFIFO | 0o600)

    assert number("main.py") == own
    assert {e.name: e.ino for e in router.readdir(ROOT, 0, 4096)}[b"main.py"] == own
    paths = ["main.py", "other/main.py", "cache", "deep", "fifo", "other/fifo"]
    assert len({number(path) for path in paths}) == len(paths)
    assert max(map(number, paths)) < 1 << 63
    router.close()


def test_private_files_at_the_root_have_inode_numbers_of_their_own(tmp_path: Path) -> None:
    private = Shadow(HostDir(tmp_path), ["kept/"], private=Memory())
    router = Router({"/": private, "/cache": Memory()}).opened()
    kept = router.mkdir(ROOT, b"kept", 0o755).node
    files = [
        router.create(parent, b"%d" % number, 0o644, 0)
        for parent in (kept, find(router, "cache"))
        for number in range(20)
    ]

    assert len({file.attr.st_ino for file in files}) == len(files)
    router.close()


def test_it_is_read_only_where_a_route_is(host: Path) -> None:
    router = Router({"/": HostDir(host), "/ro": ReadOnly(Memory())}).opened()

    assert not router.readonly
    assert Router({"/a": ReadOnly(Memory()), "/b": HostDir(host, mode="ro")}).readonly
    assert failure(lambda: router.mkdir(find(router, "ro"), b"x", 0o755)) == errno.EROFS
    router.close()


def test_attributes_are_only_asked_of_those_that_have_some(host: Path) -> None:
    plain = Memory()
    plain.xattrs = False
    router = Router({"/": HostDir(host), "/plain": plain}).opened()
    node = find(router, "plain")

    assert router.xattrs
    assert failure(lambda: router.setxattr(node, b"user.a", b"", 0)) == errno.EOPNOTSUPP
    router.setxattr(find(router, "file"), b"user.a", b"1", 0)
    router.close()


def test_changes_are_told_in_the_guests_numbers(router: Provider) -> None:
    told: list[Change] = []
    router.changes = told.append
    src, file = find(router, "src"), find(router, "file")
    names(router, src)
    base = router.providers[0]  # type: ignore[attr-defined]
    inner_src = base.lookup(ROOT, b"src").node
    inner_file = base.lookup(ROOT, b"file").node
    told.clear()

    for change in (Change(ROOT, b"x"), Change(inner_src, b"y"), Change(inner_file)):
        base.changes(change)

    assert told == [Change(ROOT, b"x"), Change(src, b"y"), Change(file)]


def test_changes_at_the_root_are_told_where_it_is_the_only_route(host: Path) -> None:
    told: list[Change] = []
    router = Router({"/": HostDir(host)}).opened()
    router.changes = told.append

    router.providers[0].changes(Change(ROOT, b"x"))

    assert told == [Change(ROOT, b"x")]
    router.close()


def test_a_saved_router_is_taken_up(host: Path) -> None:
    routes = {"/": HostDir(host), "/src/gen": HostDir(host / "src")}
    before, after = Router(routes).opened(), Router(routes).opened()
    nodes = [find(before, path) for path in ("file", "src", "src/gen", "src/gen/main.py")]
    names(before, nodes[1])

    after.import_state(before.export_state())
    before.close()

    assert [find(after, path) for path in ("file", "src", "src/gen")] == nodes[:3]
    assert after.read(nodes[3], 0, 10) == b"main"
    after.close()


@pytest.mark.parametrize("path", ["", "cache", "/a/", "/a/../b", "/a//b", "/a\0"])
def test_a_route_is_a_plain_absolute_path(path: str) -> None:
    with pytest.raises(UsageError, match="route"):
        Router({path: Memory()})


def test_a_router_in_a_router_is_refused() -> None:
    with pytest.raises(UsageError, match="Write all paths into one"):
        Router({"/": ReadOnly(Router({"/": Memory()}))})


def test_a_provider_that_does_not_open_leaves_the_others_closed() -> None:
    closed: list[str] = []

    class Closing(Memory):
        def opened(self) -> Memory:
            return self

        def close(self) -> None:
            closed.append("closed")

    class Failing(Memory):
        def opened(self) -> Memory:
            raise OSError(errno.EIO, "EIO")

    with pytest.raises(OSError, match="EIO"):
        Router({"/a": Closing(), "/b": Failing()}).opened()
    assert closed == ["closed"]
