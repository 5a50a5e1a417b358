"""taskvm.cli.mounttext: what --mount says."""

from pathlib import Path

import pytest

from taskvm import HostDir, HostFile, UsageError
from taskvm.cli.mounttext import absolute_mount, read_mount


@pytest.mark.parametrize(("mode", "readonly"), [("", False), (":rw", False), (":ro", True)])
def test_a_folder_and_a_file_are_mounted(tmp_path: Path, mode: str, readonly: bool) -> None:
    (tmp_path / "file").touch()

    folder = read_mount(f"{tmp_path}:/workspace{mode}")
    file = read_mount(f"{tmp_path}/file:/etc/file{mode}")

    assert (folder[0], type(folder[1]), folder[1].readonly) == ("/workspace", HostDir, readonly)
    assert (file[0], type(file[1]), file[1].readonly) == ("/etc/file", HostFile, readonly)


@pytest.mark.parametrize("text", ["", "/here", "/here:/there:rx", "/a:/b:ro:more"])
def test_what_is_none_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(UsageError, match="MODE is rw, ro or review") as caught:
        read_mount(text)

    assert f"--mount {text}" in str(caught.value)


def test_a_single_file_cannot_be_reviewed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UsageError, match="cannot be reviewed"):
        read_mount(f"{tmp_path}/file:/file:review")


def test_a_folder_is_the_same_one_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert absolute_mount(".:/workspace:ro") == f"{tmp_path}:/workspace:ro"
    assert absolute_mount("sub:/workspace") == f"{tmp_path}/sub:/workspace"
