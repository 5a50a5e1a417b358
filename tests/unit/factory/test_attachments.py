"""taskfactory.attachments: a task's own files, and nothing else of the host."""

import os
from pathlib import Path

import pytest

from taskfactory import attachments
from taskfactory.attachments import AttachedFile, read_attachments
from taskfactory.errors import ConfigError
from taskfactory.taskfile import load

TASK = """\
id: APP-1
attachments:
  - {id: 1a2b3c4d, filename: mock up.png, storedName: 1a2b3c4d.png, mimeType: image/png}
"""


def read(root: Path, text: str = TASK, name: str = "task.yaml") -> tuple[AttachedFile, ...]:
    path = root / name
    path.write_text(text)
    return read_attachments(load(path))


def refusal(root: Path, text: str = TASK) -> str:
    with pytest.raises(ConfigError) as caught:
        read(root, text)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "attachments"
    path.mkdir()
    return path


def test_a_tasks_files_lie_beside_it(tmp_path: Path, folder: Path) -> None:
    (folder / "1a2b3c4d.png").write_bytes(b"pixels")

    [found] = read(tmp_path)

    assert (found.path, found.data) == (folder / "1a2b3c4d.png", b"pixels")
    assert found.attachment.filename == "mock up.png"


def test_a_markdown_tasks_files_lie_in_the_directory_of_its_id(tmp_path: Path) -> None:
    stored = tmp_path / "app-1" / "attachments" / "1a2b3c4d.png"
    stored.parent.mkdir(parents=True)
    stored.write_bytes(b"pixels")

    [found] = read(tmp_path, f"---\n{TASK}---\nLook.\n", "app-1.md")

    assert found.path == stored


def test_one_that_is_missing_ends_the_run_with_its_line(tmp_path: Path) -> None:
    text = refusal(tmp_path)

    assert "task.yaml:3: attachments[0]: the attachment '1a2b3c4d.png' cannot be used" in text
    assert f"it is not in {tmp_path}/attachments" in text


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ".", "a/b", "", ".env", "a\\n"])
def test_a_stored_name_leads_nowhere_else(tmp_path: Path, folder: Path, name: str) -> None:
    (tmp_path / "secret").touch()
    (folder / ".env").touch()

    assert "not a plain name" in refusal(tmp_path, TASK.replace("1a2b3c4d.png", f'"{name}"'))


def test_links_are_not_followed(tmp_path: Path, folder: Path) -> None:
    """An agent that can write beside the task would have any of the user's files brought to it."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "1a2b3c4d.png").write_text("the host's own words")
    (folder / "1a2b3c4d.png").symlink_to(private / "1a2b3c4d.png")

    assert "cannot be used" in refusal(tmp_path)

    (folder / "1a2b3c4d.png").unlink()
    folder.rmdir()
    folder.symlink_to(private)
    assert "cannot be used" in refusal(tmp_path)


def test_only_a_regular_file_is_read(tmp_path: Path, folder: Path) -> None:
    os.mkfifo(folder / "1a2b3c4d.png")

    assert "not a regular file" in refusal(tmp_path)


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_TOTAL_BYTES"])
def test_a_file_that_is_too_large_is_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    (folder / "1a2b3c4d.png").write_bytes(b"12345")
    monkeypatch.setattr(attachments, limit, 4)

    assert "more than" in refusal(tmp_path)


def test_more_than_a_hundred_are_refused(tmp_path: Path, folder: Path) -> None:
    (folder / "1a2b3c4d.png").write_bytes(b"1")

    assert "100 attachments at most" in refusal(tmp_path, TASK + f"{TASK.splitlines()[2]}\n" * 150)
