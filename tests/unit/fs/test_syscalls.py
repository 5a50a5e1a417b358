"""The system calls by number: that each is the one it says, with its errors."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskvm.errors import UnavailableError
from taskvm.fs import syscalls


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("text")
    (tmp_path / "link").symlink_to("sub")
    (tmp_path / "up").symlink_to("..")
    fd = os.open(tmp_path, os.O_PATH)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"..", errno.EXDEV),
        (b"sub/../../x", errno.EXDEV),
        (b"/etc/passwd", errno.EXDEV),
        (b"link/file", errno.ELOOP),
        (b"up/x", errno.ELOOP),
        (b"none", errno.ENOENT),
    ],
)
def test_what_is_not_beneath_is_not_opened(directory: int, path: bytes, expected: int) -> None:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        syscalls.open_beneath(directory, path, os.O_PATH)
    assert caught.value.errno == expected


def test_magic_links_are_not_followed() -> None:
    fd = os.open("/proc/self", os.O_PATH)
    with pytest.raises(OSError, match="symbolic"):
        syscalls.open_beneath(fd, b"root", os.O_PATH)
    os.close(fd)


def test_what_is_beneath_is_opened_and_closed_on_exec(directory: int) -> None:
    fd = syscalls.open_beneath(directory, b"sub/file", os.O_RDONLY)
    assert os.read(fd, 10) == b"text"
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_link_is_opened_itself(directory: int) -> None:
    fd = syscalls.open_beneath(directory, b"link", os.O_PATH | os.O_NOFOLLOW)
    assert os.readlink(b"", dir_fd=fd) == b"sub"
    os.close(fd)


def test_renaming_with_flags(directory: int, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        syscalls.rename(directory, b"sub", directory, b"link", syscalls.RENAME_NOREPLACE)
    syscalls.rename(directory, b"sub", directory, b"link", syscalls.RENAME_EXCHANGE)
    assert (tmp_path / "sub").is_symlink()


def test_times_of_one_kind_leave_the_other_alone(directory: int, tmp_path: Path) -> None:
    fd = syscalls.open_beneath(directory, b"sub/file", os.O_PATH)
    syscalls.set_times(fd, (5, 6), syscalls.OMIT)
    before = (tmp_path / "sub/file").stat().st_mtime_ns
    assert (tmp_path / "sub/file").stat().st_atime_ns == 5_000_000_006
    syscalls.set_times(fd, syscalls.OMIT, (-1, 0))
    assert (tmp_path / "sub/file").stat().st_mtime_ns == -1_000_000_000 != before
    os.close(fd)


def test_holes_are_punched(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"x" * 8192)
        file.flush()
        keep_size_and_punch = 1 | 2
        syscalls.allocate(file.fileno(), keep_size_and_punch, 0, 4096)
        file.seek(4090)
        assert file.read(10) == b"\0" * 6 + b"x" * 4


def test_a_directory_is_read_from_any_offset(directory: int, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    entries = syscalls.read_directory(fd, 4096)
    assert syscalls.read_directory(fd, 4096) == []
    os.lseek(fd, entries[1][3], os.SEEK_SET)
    again = syscalls.read_directory(fd, 4096)
    assert {entry[0] for entry in entries} == {b".", b"..", b"sub", b"link", b"up"}
    assert again == entries[2:]
    os.close(fd)


def test_another_machine_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(UnavailableError, match="riscv64"):
        syscalls.allocate(0, 0, 0, 0)
