"""taskvm.fs.shadow: what is hidden is absent by every name, whatever the guest moves, links or creates."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.provider import ROOT, Change, DirEntry, Node, refuse
from taskvm.fs.shadow import Shadow
from taskvm.fs.syscalls import RENAME_EXCHANGE

PATTERNS = [".env", "/config/keys/", "*.pem", "!public.pem"]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    path = tmp_path / "host"
    (path / "config" / "keys").mkdir(parents=True)
    (path / "config" / "keys" / "master").write_text("secret")
    (path / "config" / "app.toml").write_text("app")
    (path / "src").mkdir()
    (path / "src" / "main.py").write_text("main")
    (path / ".env").write_text("secret")
    (path / "k.pem").write_text("secret")
    (path / "public.pem").write_text("public")
    return path


@pytest.fixture
def shadow(host: Path) -> Iterator[Shadow]:
    served = Shadow(HostDir(host), PATTERNS).opened()
    yield served
    served.close()


def names(shadow: Shadow, node: Node = ROOT) -> list[str]:
    listed = (entry.name for entry in shadow.readdir(node, 0, 1 << 16))
    return sorted(os.fsdecode(name) for name in listed if name not in (b".", b".."))


def find(shadow: Shadow, path: str) -> Node:
    node = ROOT
    for name in path.split("/"):
        node = shadow.lookup(node, name.encode()).node
    return node


def failure(call: Callable[[], object]) -> int:
    with pytest.raises(OSError, match="E") as caught:
        call()
    return caught.value.errno or 0


def test_what_is_hidden_is_neither_listed_nor_found(shadow: Shadow) -> None:
    config = find(shadow, "config")

    assert names(shadow) == ["config", "public.pem", "src"]
    assert names(shadow, config) == ["app.toml"]
    for parent, name in ((ROOT, b".env"), (ROOT, b"k.pem"), (config, b"keys"), (ROOT, b".ENV")):
        assert failure(lambda p=parent, n=name: shadow.lookup(p, n)) == errno.ENOENT
        assert failure(lambda p=parent, n=name: shadow.unlink(p, n)) == errno.ENOENT
        assert failure(lambda p=parent, n=name: shadow.rename(p, n, ROOT, b"x", 0)) == errno.ENOENT


def test_nothing_is_put_at_a_hidden_name(shadow: Shadow, host: Path) -> None:
    """Whether or not something is there: the answer does not tell."""
    file = find(shadow, "src/main.py")

    for name in (b".env", b"new.pem", b".Env"):
        for attempt in (
            lambda n=name: shadow.create(ROOT, n, 0o644, 0),
            lambda n=name: shadow.create(ROOT, n, 0o644, os.O_TRUNC),
            lambda n=name: shadow.mknod(ROOT, n, 0o644),
            lambda n=name: shadow.mkdir(ROOT, n, 0o755),
            lambda n=name: shadow.symlink(ROOT, n, b"/etc/passwd"),
            lambda n=name: shadow.link(file, ROOT, n),
            lambda n=name: shadow.rename(ROOT, b"public.pem", ROOT, n, 0),
            lambda n=name: shadow.rename(ROOT, b"public.pem", ROOT, n, RENAME_EXCHANGE),
            lambda n=name: shadow.rename(ROOT, b"src", ROOT, n, 0),
        ):
            assert failure(attempt) == errno.EACCES

    assert (host / ".env").read_text() == (host / "k.pem").read_text() == "secret"
    assert sorted(path.name for path in host.iterdir()) == sorted(
        [".env", "config", "k.pem", "public.pem", "src"]
    )


def test_a_name_that_only_directories_are_hidden_by_takes_nothing_new(
    shadow: Shadow, host: Path
) -> None:
    """A link there would be followed by the host's programs, and a file could become a directory's place."""
    config = find(shadow, "config")

    assert failure(lambda: shadow.symlink(config, b"keys", b"../src")) == errno.EACCES


def test_moving_a_parent_shows_nothing(shadow: Shadow, host: Path) -> None:
    """`config/keys` would be `other/keys`, which no pattern means."""
    assert failure(lambda: shadow.rename(ROOT, b"config", ROOT, b"other", 0)) == errno.EACCES
    exchanged = lambda: shadow.rename(ROOT, b"src", ROOT, b"config", RENAME_EXCHANGE)  # noqa: E731
    assert failure(exchanged) == errno.EACCES
    assert (host / "config" / "keys" / "master").exists()


def test_moving_a_parent_in_plants_nothing(shadow: Shadow, host: Path) -> None:
    """A directory made elsewhere cannot bring along what could not have been created in place."""
    (host / "config" / "keys" / "master").unlink()
    (host / "config" / "keys").rmdir()
    made = shadow.mkdir(ROOT, b"made", 0o755).node
    shadow.mkdir(made, b"keys", 0o755)
    shadow.rename(ROOT, b"config", ROOT, b"old", 0)  # nothing is hidden in it any more

    assert failure(lambda: shadow.rename(ROOT, b"made", ROOT, b"config", 0)) == errno.EACCES
    assert not (host / "config").exists()


def test_a_directory_made_elsewhere_is_judged_by_where_it_is(shadow: Shadow, host: Path) -> None:
    (host / "config").rename(host / "before")
    made = shadow.mkdir(ROOT, b"made", 0o755).node
    shadow.rename(ROOT, b"made", ROOT, b"config", 0)

    assert failure(lambda: shadow.mkdir(made, b"keys", 0o755)) == errno.EACCES


def test_a_guest_that_forgets_a_parent_gains_nothing(shadow: Shadow, host: Path) -> None:
    """A stale idea of where a directory is would judge what is in it by an old path."""
    top = shadow.mkdir(ROOT, b"top", 0o755)
    inner = shadow.mkdir(top.node, b"config", 0o755)
    moved = Shadow(HostDir(host), ["/new/config/keys"]).opened()
    top = moved.lookup(ROOT, b"top")
    inner = moved.lookup(top.node, b"config")

    moved.forget(top.node, 1)
    moved.rename(ROOT, b"top", ROOT, b"new", 0)

    assert failure(lambda: moved.create(inner.node, b"keys", 0o644, 0)) == errno.EACCES
    moved.close()


def test_a_hard_link_that_the_host_made_shows_nothing(host: Path) -> None:
    os.link(host / ".env", host / "src" / "copied.txt")
    os.link(host / "config" / "keys" / "master", host / "master")
    os.link(host / "public.pem", host / "published")
    shadow = Shadow(HostDir(host), PATTERNS).opened()

    src = find(shadow, "src")
    for path in ("src/copied.txt", "master"):
        assert failure(lambda path=path: find(shadow, path)) == errno.ENOENT
    assert "copied.txt" in names(shadow, src)  # no pattern means the name
    cut = lambda: shadow.create(src, b"copied.txt", 0o644, os.O_TRUNC)  # noqa: E731
    assert failure(cut) == errno.EACCES
    assert (host / ".env").read_text() == "secret"
    assert shadow.read(find(shadow, "published"), 0, 10) == b"public"
    shadow.close()


def test_a_hard_link_is_looked_for_again_after_a_while(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("taskvm.fs.shadow.time.monotonic", lambda: now[0])
    os.link(host / "public.pem", host / "published")
    shadow = Shadow(HostDir(host), PATTERNS).opened()
    find(shadow, "published")

    os.link(host / ".env", host / "leak")
    now[0] += 61

    assert failure(lambda: find(shadow, "leak")) == errno.ENOENT
    shadow.close()


def test_what_is_mounted_inside_does_not_end_the_look_for_hard_links() -> None:
    class Mounted(Memory):
        def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
            if node != ROOT and node == self.lookup(ROOT, b"mounted").node:
                raise refuse(errno.EXDEV)
            return super().readdir(node, offset, size)

    shadow = Shadow(Mounted(), [".env"])
    shadow.mkdir(ROOT, b"mounted", 0o755)
    env = shadow.inner.create(ROOT, b".env", 0o644, 0).node
    shadow.inner.link(env, ROOT, b"leak")
    shadow.link(shadow.create(ROOT, b"one", 0o644, 0).node, ROOT, b"two")

    assert shadow.lookup(ROOT, b"two")
    assert failure(lambda: shadow.lookup(ROOT, b"leak")) == errno.ENOENT


def test_a_tree_too_large_to_look_through_fails_closed(
    host: Path, shadow: Shadow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskvm.fs.shadow.MAX_WALK", 1)
    os.link(host / "src" / "main.py", host / "src" / "again.py")
    (host / "plain" / "a").mkdir(parents=True)
    (host / "plain" / "b").mkdir()
    (host / "plain" / "c").mkdir()

    assert failure(lambda: find(shadow, "src/main.py")) == errno.EACCES
    assert failure(lambda: shadow.rename(ROOT, b"plain", ROOT, b"other", 0)) == errno.EACCES


def test_a_number_that_was_guessed_leads_nowhere(shadow: Shadow) -> None:
    """Looking for links and moving directories makes the inner provider hand out nodes of hidden things."""
    failure(lambda: shadow.rename(ROOT, b"config", ROOT, b"other", 0))
    shadow.inner.lookup(ROOT, b".env")

    for node in range(2, 50):
        assert failure(lambda node=node: shadow.read(node, 0, 10)) == errno.ESTALE
        assert failure(lambda node=node: shadow.getattr(node)) == errno.ESTALE


def test_a_directory_with_something_hidden_in_it_stays(shadow: Shadow, host: Path) -> None:
    config = find(shadow, "config")
    shadow.unlink(config, b"app.toml")

    assert names(shadow, config) == []
    assert failure(lambda: shadow.rmdir(ROOT, b"config")) == errno.ENOTEMPTY


def test_a_listing_goes_on_behind_what_is_hidden(tmp_path: Path) -> None:
    """A piece in which everything is hidden is not the end."""
    for number in range(500):
        (tmp_path / f"{'hidden' * 20}{number}.pem").touch()
        (tmp_path / f"shown{number}").touch()
    shadow = Shadow(HostDir(tmp_path), ["*.pem"]).opened()

    listed: list[bytes] = []
    offset = 0
    while entries := shadow.readdir(ROOT, offset, 1024):
        listed += [entry.name for entry in entries]
        offset = entries[-1].offset

    assert len(listed) == 502
    shadow.close()


def test_everything_else_works_as_without(shadow: Shadow, host: Path) -> None:
    made = shadow.mkdir(ROOT, b"made", 0o755).node
    file = shadow.create(made, b"file", 0o644, 0).node
    shadow.write(file, 0, memoryview(b"data"), append=False)
    shadow.rename(ROOT, b"made", ROOT, b"moved", 0)
    shadow.link(file, ROOT, b"link")
    shadow.rename(ROOT, b"link", ROOT, b"src", RENAME_EXCHANGE)

    assert (host / "moved" / "file").read_text() == (host / "src").read_text() == "data"
    assert (host / "link" / "main.py").read_text() == "main"
    assert shadow.read(find(shadow, "src"), 0, 10) == b"data"


def test_changes_of_the_host_tell_no_hidden_name(shadow: Shadow) -> None:
    told: list[Change] = []
    shadow.changes = told.append
    src = find(shadow, "src")

    for change in (
        Change(ROOT, b".env"),
        Change(999, b"x"),
        Change(ROOT, b"src"),
        Change(src),
        Change(998),
    ):
        shadow.inner.changes(change)

    assert told == [Change(ROOT, b"src"), Change(src)]


def test_nothing_of_a_look_around_stays_behind(shadow: Shadow, host: Path) -> None:
    """Each node that a walk asked for is given back to the inner provider."""
    os.link(host / ".env", host / "src" / "copied.txt")
    before = len(shadow.inner._nodes)  # type: ignore[attr-defined]
    failure(lambda: shadow.rename(ROOT, b"config", ROOT, b"other", 0))
    assert len(shadow.inner._nodes) == before  # type: ignore[attr-defined]

    failure(lambda: find(shadow, "src/copied.txt"))

    # `src`, which the guest has, and the one hidden file that is kept an eye on
    assert len(shadow.inner._nodes) == before + 2  # type: ignore[attr-defined]


# What the host moves while the guest holds it...


def served(host: Path, patterns: list[str]) -> Shadow:
    """A shadow that attends to what the host does, as the server lets it."""
    shadow = Shadow(HostDir(host), patterns).opened()
    assert isinstance(shadow, Shadow)
    shadow.changes = lambda _change: None
    return shadow


def attend(shadow: Shadow) -> None:
    for source in shadow.sources():
        source.ready()


def test_a_directory_that_the_host_moves_to_a_hidden_name_shows_nothing_more(host: Path) -> None:
    shadow = served(host, ["/secrets/"])
    work, file = find(shadow, "src"), find(shadow, "src/main.py")
    assert shadow.read(file, 0, 10) == b"main"

    (host / "src").rename(host / "secrets")
    (host / "secrets" / "new").write_text("secret")
    assert failure(lambda: shadow.lookup(ROOT, b"secrets")) == errno.ENOENT

    for attempt in (
        lambda: shadow.lookup(work, b"new"),
        lambda: shadow.readdir(work, 0, 4096),
        lambda: shadow.getattr(work),
        lambda: shadow.create(work, b"planted", 0o644, 0),
        lambda: shadow.read(file, 0, 10),
        lambda: shadow.write(file, 0, memoryview(b"x"), append=False),
    ):
        assert failure(attempt) == errno.ESTALE
    assert sorted(path.name for path in (host / "secrets").iterdir()) == ["main.py", "new"]
    shadow.close()


def test_what_the_guest_keeps_of_what_is_out_of_reach_is_forgotten(host: Path) -> None:
    """Its kernel asks nobody for a page that it has, or for a listing that it took after a change of its own."""
    shadow = served(host, ["/secrets/"])
    told: list[Change] = []
    shadow.changes = told.append
    work, file = find(shadow, "src"), find(shadow, "src/main.py")
    made = shadow.create(work, b"made", 0o644, 0).node
    shadow.readdir(work, 0, 4096)
    attend(shadow)
    told.clear()

    (host / "src").rename(host / "secrets")
    attend(shadow)
    assert failure(lambda: shadow.getattr(work)) == errno.ESTALE

    assert {Change(work), Change(file), Change(made)} <= set(told)
    shadow.close()


@pytest.mark.parametrize("ask", ["unlink", "rmdir", "rename", "create", "lookup"])
def test_a_directory_that_the_host_moves_is_judged_by_where_it_is_now(host: Path, ask: str) -> None:
    """Any question about the new name makes the inner provider follow; so must the judgement."""
    shadow = served(host, ["/b/main.py"])
    held, file = find(shadow, "src"), find(shadow, "src/main.py")

    (host / "src").rename(host / "b")
    (host / "b" / "keep").touch()
    questions: dict[str, Callable[[], object]] = {
        "unlink": lambda: shadow.unlink(ROOT, b"b"),
        "rmdir": lambda: shadow.rmdir(ROOT, b"b"),
        "rename": lambda: shadow.rename(ROOT, b"b", ROOT, b"c", 0),
        "create": lambda: shadow.create(ROOT, b"b", 0o644, os.O_EXCL),
        "lookup": lambda: shadow.lookup(ROOT, b"b"),
    }
    with suppress(OSError):
        questions[ask]()

    assert failure(lambda: shadow.lookup(held, b"main.py")) in (errno.ENOENT, errno.ESTALE)
    assert failure(lambda: shadow.read(file, 0, 10)) == errno.ESTALE
    found = shadow.lookup(ROOT, b"b")
    assert found.node == held
    assert names(shadow, held) == ["keep"]
    shadow.close()


@pytest.mark.parametrize("ask", ["unlink", "rename", "lookup", "links", "nothing"])
def test_a_file_that_the_host_moves_to_a_hidden_name_is_out_of_reach(host: Path, ask: str) -> None:
    """An atomic save of the host's: what was a temporary file is the secret now."""
    shadow = served(host, [".env"])
    held = shadow.create(ROOT, b"tmp", 0o644, 0).node
    shadow.write(held, 0, memoryview(b"old"), append=False)
    attend(shadow)  # so that the next event is not the guest's own

    (host / "tmp").write_text("secret")
    (host / "tmp").rename(host / ".env")
    if ask == "links":
        os.link(host / "public.pem", host / "again.pem")
    questions: dict[str, Callable[[], object]] = {
        "unlink": lambda: shadow.unlink(ROOT, b".env"),
        "rename": lambda: shadow.rename(ROOT, b".env", ROOT, b"x", 0),
        "lookup": lambda: shadow.lookup(ROOT, b"tmp"),
        "links": lambda: shadow.lookup(ROOT, b"again.pem"),
        "nothing": lambda: None,
    }
    with suppress(OSError):
        questions[ask]()
    attend(shadow)

    assert failure(lambda: shadow.read(held, 0, 10)) == errno.ESTALE
    write = lambda: shadow.write(held, 0, memoryview(b"guest"), append=False)  # noqa: E731
    assert failure(write) == errno.ESTALE
    assert (host / ".env").read_text() == "secret"
    shadow.close()


def test_what_the_host_moves_back_is_found_again(host: Path) -> None:
    shadow = served(host, [".env", "/secrets/"])
    work, file = find(shadow, "src"), find(shadow, "src/main.py")
    tmp = shadow.create(ROOT, b"tmp", 0o644, 0).node
    attend(shadow)
    for name, hidden in (("src", "secrets"), ("tmp", ".env")):
        (host / name).rename(host / hidden)
        failure(lambda hidden=hidden: shadow.lookup(ROOT, hidden.encode()))
    attend(shadow)
    assert failure(lambda: shadow.read(file, 0, 10)) == errno.ESTALE

    (host / "secrets").rename(host / "shown")
    (host / ".env").rename(host / "env")

    assert shadow.lookup(ROOT, b"shown").node == work
    assert shadow.read(file, 0, 10) == b"main"
    assert shadow.lookup(ROOT, b"env").node == tmp
    assert shadow.read(tmp, 0, 10) == b""
    shadow.close()


def test_what_the_host_moves_away_or_removes_is_not_kept_from_who_has_it_open(host: Path) -> None:
    """A file that was removed has no name that could be hidden."""
    shadow = served(host, [".env"])
    removed = shadow.create(ROOT, b"removed", 0o644, 0).node
    replaced = shadow.create(ROOT, b"replaced", 0o644, 0).node
    for node in (removed, replaced):
        shadow.write(node, 0, memoryview(b"data"), append=False)
    attend(shadow)

    (host / "removed").unlink()
    (host / "new").write_text("new")
    (host / "new").rename(host / "replaced")
    attend(shadow)

    assert shadow.read(removed, 0, 10) == shadow.read(replaced, 0, 10) == b"data"
    assert shadow.read(find(shadow, "replaced"), 0, 10) == b"new"
    shadow.close()


def test_what_is_barred_stays_so_in_a_copy_of_the_guest(host: Path) -> None:
    before = served(host, ["/secrets/"])
    file = find(before, "src/main.py")
    (host / "src").rename(host / "secrets")
    failure(lambda: before.lookup(ROOT, b"secrets"))

    after = served(host, ["/secrets/"])
    after.import_state(before.export_state())
    before.close()

    assert failure(lambda: after.read(file, 0, 10)) == errno.ESTALE
    after.close()


@pytest.mark.parametrize("saved", [False, True])
def test_without_anybody_who_tells_of_moves_names_are_looked_at_again(
    host: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    """On NFS, or beyond the limit of watches: a file that the server has open stays open, wherever it is moved to."""
    now = [100.0]
    shadow = Shadow(HostDir(host), [".env", "/secrets/"])  # not opened: nothing is watched
    file, inner = shadow.create(ROOT, b"tmp", 0o644, 0).node, find(shadow, "src/main.py")
    monkeypatch.setattr("taskvm.fs.shadow.time.monotonic", lambda: now[0])
    for node in (file, inner):
        shadow.write(node, 0, memoryview(b"plain"), append=False)

    (host / "tmp").rename(host / ".env")
    (host / "src").rename(host / "secrets")
    if saved:
        before, shadow = shadow, Shadow(HostDir(host), [".env", "/secrets/"])
        shadow.import_state(before.export_state())
        before.close()
    now[0] += 1e9 if not saved else 0

    for node in (file, inner):
        assert failure(lambda node=node: shadow.read(node, 0, 10)) == errno.ESTALE
    shadow.close()


def test_names_that_somebody_watches_are_not_looked_at_again(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow = served(host, [".env"])
    file = find(shadow, "src/main.py")
    monkeypatch.setattr("taskvm.fs.shadow.time.monotonic", lambda: 1e9)
    looks: list[bytes] = []
    monkeypatch.setattr(shadow.inner, "lookup", lambda _node, name: looks.append(name))

    for _ in range(3):
        shadow.read(file, 0, 10)

    assert looks == []
    shadow.close()
