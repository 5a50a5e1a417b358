"""Private directories and files that are replaced in one step (taskvm.paths)."""

import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from taskvm import paths
from taskvm.errors import HostError
from taskvm.paths import measure, newest_first, private_dir, replace_file, seized, state_dir


def test_a_directory_is_for_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made is 0700."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    assert state_dir() == tmp_path / "taskvm"
    assert state_dir().stat().st_mode & 0o777 == 0o700


def test_a_replaced_file_is_the_old_one_or_the_new(tmp_path: Path) -> None:
    """No temporary file is left, whether it succeeds or not."""
    note = tmp_path / "note"
    replace_file(note, b"one")
    replace_file(note, b"two")
    with pytest.raises(HostError, match="missing"):
        replace_file(tmp_path / "missing" / "note", b"x")

    assert note.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [note]


def test_a_directory_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    """The error names the directory and the kernel's reason."""
    (tmp_path / "file").write_text("")

    with pytest.raises(HostError, match="Not a directory|File exists"):
        private_dir(tmp_path / "file" / "below")


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    """Whoever can put an image or a saved machine there decides what QEMU loads."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)

    with pytest.raises(HostError, match="mode 777"):
        private_dir(tmp_path / "shared")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """A predictable TASKVM_CACHE below /tmp may have been made by somebody else first."""
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 1234, 1234)

    with pytest.raises(HostError, match="owner 1234"):
        private_dir(tmp_path / "theirs")


def test_what_took_the_place_of_a_seized_directory_is_not_seized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process replaces it between the look and the lock: the new one may be in use."""
    path = tmp_path / "template"
    path.mkdir()
    lock = paths.lock_if_free

    def replaced_then_locked(descriptor: int) -> AbstractContextManager[bool]:
        path.rename(tmp_path / "old")
        path.mkdir()
        return lock(descriptor)

    monkeypatch.setattr(paths, "lock_if_free", replaced_then_locked)
    with seized(path) as free:
        assert not free
    monkeypatch.undo()
    with seized(path) as free:
        assert free


def test_what_is_removed_during_a_look_is_left_out(tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (number, number))
    found = [*tmp_path.iterdir()]
    (tmp_path / "b").unlink()

    assert newest_first(found) == [tmp_path / "c", tmp_path / "a"]


def test_what_is_removed_while_it_is_measured_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes a checkpoint while this one lists them."""
    (tmp_path / "gone").write_bytes(bytes(4096))
    (tmp_path / "kept").write_bytes(bytes(4096))
    lstat = os.lstat

    def lstat_late(path: str | Path) -> os.stat_result:
        (tmp_path / "gone").unlink(missing_ok=True)
        return lstat(path)

    whole = measure(tmp_path)
    monkeypatch.setattr(os, "lstat", lstat_late)

    assert measure(tmp_path) == whole - 4096
    assert measure(tmp_path / "gone") == 0
