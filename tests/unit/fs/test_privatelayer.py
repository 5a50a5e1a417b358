"""taskvm.fs.privatelayer, on taskvm.fs.mirrors: what the guest puts under hidden names is never the host's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.kernel_mount import KernelMount
from tests.support.waiting import eventually

from taskvm.errors import UsageError
from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.provider import ROOT, Change, Node, Provider
from taskvm.fs.router import Router
from taskvm.fs.shadow import Shadow
from taskvm.fs.syscalls import RENAME_EXCHANGE
from taskvm.review.mounted import ReviewMount

PATTERNS = [".env", "node_modules/", "/config/keys", "*.key", "!public.key"]
Mount = Callable[[Provider], KernelMount]


@pytest.fixture
def host(host: Path) -> Path:
    """A project with secrets, and with modules of the host's own platform."""
    (host / "config" / "keys").mkdir(parents=True)
    (host / "config" / "keys" / "master").write_text("secret")
    (host / "packages" / "app" / "node_modules").mkdir(parents=True)
    (host / "packages" / "app" / "node_modules" / "of_the_host").write_text("secret")
    (host / "packages" / "app" / "index.js").write_text("index")
    (host / ".env").write_text("secret")
    return host


@pytest.fixture
def layered(host: Path) -> Iterator[Provider]:
    served = Shadow(HostDir(host), PATTERNS, private=Memory()).opened()
    yield served
    served.close()


@pytest.fixture
def mounted(kernel_mount: Mount, host: Path) -> Path:
    return kernel_mount(Shadow(HostDir(host), PATTERNS, private=Memory())).path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def tree(top: Path) -> dict[str, str]:
    return {
        str(path.relative_to(top)): path.read_text() if path.is_file() else "/"
        for path in sorted(top.rglob("*"))
    }


def failure(call: Callable[[], object]) -> int:
    with pytest.raises(OSError, match="Errno") as caught:
        call()
    return caught.value.errno or 0


def find(provider: Provider, path: str) -> Node:
    node = ROOT
    for name in path.split("/"):
        node = provider.lookup(node, name.encode()).node
    return node


def test_what_the_guest_writes_under_a_hidden_name_stays_with_it(mounted: Path, host: Path) -> None:
    """The host's things of these names are neither seen nor touched, and the guest's are not on the host."""
    before = tree(host)

    assert names(mounted) == ["config", "packages"]
    (mounted / ".env").write_text("guest")
    modules = mounted / "packages" / "app" / "node_modules"
    (modules / "left-pad" / "lib").mkdir(parents=True)
    (modules / "left-pad" / "index.js").write_text("pad")
    (modules / ".bin").symlink_to("left-pad/lib")
    (mounted / "config" / "keys").write_text("a file where the host has a directory")

    assert tree(host) == before
    assert (mounted / ".env").read_text() == "guest"
    assert names(mounted) == [".env", "config", "packages"]
    assert names(mounted / "packages" / "app") == ["index.js", "node_modules"]
    assert names(modules) == [".bin", "left-pad"]
    assert (modules / ".bin").readlink() == Path("left-pad/lib")
    assert (mounted / "config" / "keys").read_text().startswith("a file")


def test_everything_else_is_the_hosts(mounted: Path, host: Path) -> None:
    (mounted / "src").mkdir()
    (mounted / "src" / "main.py").write_text("main")
    (mounted / "public.key").write_text("public")

    assert (host / "src" / "main.py").read_text() == "main"
    assert (host / "public.key").read_text() == "public"
    assert (mounted / "src" / "main.py").stat().st_ino == (host / "src" / "main.py").stat().st_ino


def test_private_things_are_changed_and_removed_like_others(mounted: Path, host: Path) -> None:
    before = tree(host)
    (mounted / ".env").write_text("one")
    with (mounted / ".env").open("a") as opened:
        opened.write(" two")
        opened.flush()
        (mounted / ".env").unlink()
        opened.write(" three")
        assert os.fstat(opened.fileno()).st_size >= len("one two")
    (mounted / "a.key").write_text("key")
    (mounted / "a.key").rename(mounted / "b.key")
    (mounted / "b.key").chmod(0o600)
    (mounted / "c.key").hardlink_to(mounted / "b.key")
    (mounted / "b.key").unlink()

    assert not (mounted / ".env").exists()
    assert (mounted / "c.key").read_text() == "key"
    assert (mounted / "c.key").stat().st_mode & 0o777 == 0o600
    (mounted / "c.key").unlink()
    assert names(mounted) == ["config", "packages"]
    assert tree(host) == before


def test_nothing_crosses_but_by_copying(mounted: Path, host: Path) -> None:
    """`mv` and `shutil.move` copy; a hard link that crosses is refused, or the host would have what is private."""
    (mounted / "plain").write_text("plain")
    (mounted / ".env").write_text("guest")

    assert failure(lambda: (mounted / ".env").rename(mounted / "shown")) == errno.EXDEV
    assert failure(lambda: (mounted / "plain").rename(mounted / "a.key")) == errno.EXDEV
    assert failure(lambda: (mounted / "shown").hardlink_to(mounted / ".env")) == errno.EXDEV
    assert failure(lambda: (mounted / "a.key").hardlink_to(mounted / "plain")) == errno.EXDEV
    os.system(f"mv {mounted}/plain {mounted}/a.key && mv {mounted}/.env {mounted}/shown")

    assert (mounted / "a.key").read_text() == "plain"
    assert (host / "shown").read_text() == "guest"
    assert not (host / "plain").exists()
    assert not (host / "a.key").exists()
    assert (host / ".env").read_text() == "secret"


def test_a_name_that_only_directories_are_hidden_by_takes_no_file(
    mounted: Path, host: Path
) -> None:
    assert failure(lambda: (mounted / "node_modules").write_text("x")) == errno.EACCES
    assert failure(lambda: (mounted / "node_modules").symlink_to("config")) == errno.EACCES
    (mounted / "node_modules").mkdir()

    assert not (host / "node_modules").exists()


def test_private_things_move_with_the_directory_they_are_in(mounted: Path, host: Path) -> None:
    (mounted / "a" / "b").mkdir(parents=True)
    (mounted / "a" / "b" / ".env").write_text("guest")
    with (mounted / "a" / "b" / ".env").open() as opened:
        (mounted / "a").rename(mounted / "packages" / "moved")
        assert opened.read() == "guest"

    assert (mounted / "packages" / "moved" / "b" / ".env").read_text() == "guest"
    assert tree(host / "packages" / "moved") == {"b": "/"}
    (mounted / "a" / "b").mkdir(parents=True)
    assert names(mounted / "a" / "b") == []


def test_a_move_that_fails_leaves_private_things_where_they_were(mounted: Path, host: Path) -> None:
    (mounted / "a").mkdir()
    (mounted / "a" / ".env").write_text("guest")
    (mounted / "full").mkdir()
    (host / "full" / "file").write_text("")

    assert failure(lambda: (mounted / "a").rename(mounted / "full")) == errno.ENOTEMPTY
    assert (mounted / "a" / ".env").read_text() == "guest"
    assert names(mounted / "full") == ["file"]


def test_a_directory_with_private_things_is_not_empty(mounted: Path, host: Path) -> None:
    for name in ("a", "b"):
        (mounted / name).mkdir()
    (mounted / "b" / ".env").write_text("guest")

    assert failure((mounted / "b").rmdir) == errno.ENOTEMPTY
    assert failure(lambda: (mounted / "a").rename(mounted / "b")) == errno.ENOTEMPTY
    (mounted / "b" / ".env").unlink()
    (mounted / "b").rmdir()
    (mounted / "b").mkdir()
    assert names(mounted / "b") == []
    assert not (host / "b" / ".env").exists()


def test_a_directory_that_leaves_the_patterns_reach_stays(layered: Provider, host: Path) -> None:
    """By another path its private things would be shown, and be the host's."""
    (host / "config" / "keys" / "master").unlink()
    (host / "config" / "keys").rmdir()
    layered.create(find(layered, "config"), b"keys", 0o644, 0)

    for flags in (0, RENAME_EXCHANGE):
        with pytest.raises(OSError, match="EACCES|EINVAL"):
            layered.rename(ROOT, b"config", ROOT, b"packages" if flags else b"other", flags)
    assert (host / "config").is_dir()


def test_what_the_host_removes_and_makes_again_has_its_private_things(
    mounted: Path, host: Path
) -> None:
    """As `git checkout` of a branch without the package, and back."""
    (mounted / "packages" / "app" / "node_modules").mkdir()
    (mounted / "packages" / "app" / "node_modules" / "module").write_text("guest")

    (host / "packages").rename(host / "away")
    (host / "away").rename(host / "packages")

    module = mounted / "packages" / "app" / "node_modules" / "module"
    assert eventually(module.exists)
    assert module.read_text() == "guest"


def test_a_read_only_directory_takes_private_things(kernel_mount: Mount, host: Path) -> None:
    shadow = Shadow(HostDir(host, mode="ro"), PATTERNS, private=Memory())
    mounted, before = kernel_mount(shadow).path, tree(host)

    (mounted / "packages" / "app" / "node_modules" / "x").mkdir(parents=True)
    (mounted / ".env").write_text("guest")

    assert failure(lambda: (mounted / "new").write_text("x")) == errno.EROFS
    assert failure((mounted / "packages" / "app" / "index.js").unlink) == errno.EROFS
    assert failure(lambda: (mounted / "packages").chmod(0o700)) == errno.EROFS
    assert failure(lambda: os.truncate(mounted / "packages" / "app" / "index.js", 0)) == errno.EROFS
    assert tree(host) == before


def test_what_is_private_is_limited(host: Path, kernel_mount: Mount) -> None:
    limited = Shadow(HostDir(host), PATTERNS, private=Memory(limit_bytes=1 << 20))
    mounted = kernel_mount(limited).path

    assert failure(lambda: (mounted / ".env").write_bytes(bytes(2 << 20))) == errno.ENOSPC
    assert (host / ".env").read_text() == "secret"


def test_each_mount_has_its_own(host: Path) -> None:
    shadow = Shadow(HostDir(host), PATTERNS, private=Memory())
    first, second = shadow.opened(), shadow.opened()
    first.create(ROOT, b".env", 0o644, 0)

    assert failure(lambda: second.lookup(ROOT, b".env")) == errno.ENOENT
    first.close()
    second.close()


def test_a_private_number_that_was_guessed_leads_nowhere(layered: Provider) -> None:
    """The private root and the mirrors of directories are among them."""
    layered.mkdir(find(layered, "packages/app"), b"node_modules", 0o755)
    given = find(layered, "packages/app/node_modules")

    for node in range(0, 40, 2):
        if node != given:
            assert failure(lambda node=node: layered.getattr(node)) == errno.ESTALE
            assert failure(lambda node=node: layered.mkdir(node, b"x", 0o755)) == errno.ESTALE
    layered.forget(given, 2)
    assert failure(lambda: layered.getattr(given)) == errno.ESTALE
    layered.forget(given, 2)  # too much only hurts the guest
    assert find(layered, "packages/app/node_modules") == given


def test_a_saved_guest_goes_on_with_its_private_files(kernel_mount: Mount, host: Path) -> None:
    shadow = Shadow(HostDir(host), PATTERNS, private=Memory())
    mount = kernel_mount(shadow)
    (mount.path / "packages" / "app" / "node_modules").mkdir()
    with (mount.path / ".env").open("w") as opened:
        opened.write("guest")
        opened.flush()
        mount.take_up(shadow, mount.save())
        opened.write(" again")

    assert (mount.path / ".env").read_text() == "guest again"
    assert names(mount.path / "packages" / "app") == ["index.js", "node_modules"]
    assert (host / ".env").read_text() == "secret"


def test_a_listing_in_pieces_has_every_name_once(layered: Provider, host: Path) -> None:
    for number in range(200):
        (host / f"file{number}").write_text("")
        layered.create(ROOT, b"%d.key" % number, 0o644, 0)

    listed, offset = [], 0
    while entries := layered.readdir(ROOT, offset, 1024):
        listed.append(entries[0].name)  # as a reader with little room
        offset = entries[0].offset

    shown = {f"file{number}" for number in range(200)} | {f"{number}.key" for number in range(200)}
    assert sorted(os.fsdecode(name) for name in listed) == sorted(
        shown | {".", "..", "config", "packages"}
    )


def test_changes_of_the_host_are_told_in_the_guests_numbers(layered: Provider, host: Path) -> None:
    told: list[Change] = []
    layered.changes = told.append
    node = find(layered, "packages/app/index.js")
    (source,) = layered.sources()

    (host / "packages" / "app" / "index.js").write_text("changed")
    (host / ".env").write_text("changed")
    source.ready()

    assert {change.node for change in told if change.name is None} == {node}
    assert b".env" not in {change.name for change in told}


def test_a_mount_for_review_has_no_private_layer(host: Path) -> None:
    shadow = Shadow(HostDir(host, mode="review"), PATTERNS, private=Memory())

    with pytest.raises(UsageError, match="never applied"):
        ReviewMount.of(1, "/workspace", shadow)


def test_two_private_layers_in_one_another_are_refused() -> None:
    inner = Shadow(Memory(), ["a"], private=Memory())

    with pytest.raises(UsageError, match="one Shadow"):
        Shadow(Router({"/": inner}), ["b"], private=Memory())
