"""Looking at and changing a host directory by paths that a guest chose (taskvm.fs.hostpaths)."""

import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taskvm.fs.hostpaths import ChangedError, HostPaths, Seen

OUTSIDE = ["../secret", "up/secret", "/etc/passwd", "a/../../secret", "link-to-file"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with links out of it, beside a file that nobody may reach."""
    directory = tmp_path / "root"
    (directory / "a").mkdir(parents=True)
    (directory / "file").write_text("old")
    (tmp_path / "secret").write_text("secret")
    (directory / "up").symlink_to("..")
    (directory / "link-to-file").symlink_to("../secret")
    return directory


@pytest.fixture
def tree(root: Path) -> Iterator[HostPaths]:
    tree = HostPaths(os.open(root, os.O_PATH | os.O_DIRECTORY))
    yield tree
    tree.close()


def put(tree: HostPaths, path: str) -> object:
    return tree.write(path, io.BytesIO(b"guest"), 0o644, tree.see(path))


CHANGES: list[Callable[[HostPaths, str], object]] = [
    put,
    lambda tree, path: tree.link(path, "/etc/passwd", tree.see(path)),
    lambda tree, path: tree.mkdir(path, 0o755),
    lambda tree, path: tree.chmod(path, 0o777, None),
    lambda tree, path: tree.remove(path, Seen(stat.S_IFREG, 6, 0, 0)),
]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_outside_is_changed(
    root: Path, tree: HostPaths, change: Callable[[HostPaths, str], object], path: str
) -> None:
    """By a link, by dots or from the top: the file beside the root stays as it is, and so does its mode."""
    secret = root.parent / "secret"
    secret.chmod(0o600)

    try:
        change(tree, path)
    except (OSError, ChangedError):
        pass
    else:
        assert path == "link-to-file"  # the link itself may be replaced

    assert secret.read_text() == "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert sorted(entry.name for entry in root.parent.iterdir()) == ["root", "secret"]


@pytest.mark.parametrize("path", ["../secret", "up/secret", "link-to-file"])
def test_nothing_outside_is_read(tree: HostPaths, path: str) -> None:
    with pytest.raises(OSError), tree.reading(path):  # noqa: PT011 - any errno will do
        pass


def test_a_fifo_does_not_hold_a_reader_up(root: Path, tree: HostPaths) -> None:
    os.mkfifo(root / "fifo")

    with pytest.raises(OSError, match="not a regular file"), tree.reading("fifo"):
        pass


def test_a_file_is_replaced_whole_with_permissions_and_nothing_more(
    root: Path, tree: HostPaths
) -> None:
    seen = tree.write("file", io.BytesIO(b"new"), 0o4755, tree.see("file"))

    assert seen == tree.see("file")
    assert (root / "file").read_text() == "new"
    assert stat.S_IMODE((root / "file").stat().st_mode) == 0o755
    assert sorted(tree.names("")) == ["a", "file", "link-to-file", "up"]


@pytest.mark.parametrize("then", ["changed", "gone", "another"])
def test_what_is_not_what_was_seen_is_neither_replaced_nor_removed(
    root: Path, tree: HostPaths, then: str
) -> None:
    seen = tree.see("file")
    assert seen is not None
    if then == "changed":
        (root / "file").write_text("host's own")
    else:
        (root / "file").rename(root / "kept")
    if then == "another":
        (root / "file").mkdir()
    before = sorted(path.name for path in root.iterdir())

    with pytest.raises(ChangedError):
        tree.write("file", io.BytesIO(b"guest"), 0o644, seen)
    if then != "gone":
        with pytest.raises(ChangedError):
            tree.remove("file", seen)

    assert sorted(path.name for path in root.iterdir()) == before


def test_a_file_made_meanwhile_is_not_replaced(root: Path, tree: HostPaths) -> None:
    (root / "new").write_text("host's own")

    with pytest.raises(ChangedError):
        tree.write("new", io.BytesIO(b"guest"), 0o644, None)

    assert (root / "new").read_text() == "host's own"


def test_a_directory_with_something_in_it_is_not_removed(root: Path, tree: HostPaths) -> None:
    seen = tree.see("a")
    assert seen is not None
    (root / "a" / "late").write_text("host's own")

    with pytest.raises(OSError, match="not empty"):
        tree.remove("a", seen)
