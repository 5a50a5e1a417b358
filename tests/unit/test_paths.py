"""Private directories and files that are replaced in one step (taskvm.paths)."""

from pathlib import Path

import pytest

from taskvm.errors import HostError
from taskvm.paths import private_dir, replace_file, state_dir


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
