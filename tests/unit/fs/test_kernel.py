"""The workspace file system under a real kernel: this host's, which mounts /dev/fuse as a guest's does.

tests/support/kernel_mount.py does what the guest agent does: it copies messages between /dev/fuse and the port, and
knows nothing of them. It needs root and /dev/fuse; without them every test here is skipped with the reason.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.kernel_mount import libc
from tests.support.waiting import PATIENCE_S, eventually

from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.provider import Provider


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program with no settings of this machine's user."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(cwd),
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@localhost",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@localhost",
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_bytes_written_by_the_guest_are_the_hosts(guest: Path, host: Path) -> None:
    data = os.urandom(3 * 1024 * 1024 + 17)

    (guest / "file").write_bytes(data)

    assert (host / "file").read_bytes() == data
    assert (guest / "file").read_bytes() == data


def test_attributes_pass_through(guest: Path, host: Path) -> None:
    (host / "file").write_bytes(b"x" * 5000)
    os.utime(host / "file", ns=(1_234_567_890_123_456_789, 987_654_321_987_654_321))
    (host / "file").chmod(0o640)

    seen, real = (guest / "file").lstat(), (host / "file").lstat()

    for field in ("st_ino", "st_mode", "st_size", "st_nlink", "st_uid", "st_gid", "st_blocks"):
        assert getattr(seen, field) == getattr(real, field), field
    assert (seen.st_mtime_ns, seen.st_atime_ns) == (real.st_mtime_ns, real.st_atime_ns)


def test_a_directory_of_thousands_lists_completely(guest: Path, host: Path) -> None:
    made = {f"file-{number:05}-{'x' * (number % 90)}" for number in range(3000)}
    for name in made:
        (host / name).touch()

    assert names(guest) == sorted(made)
    assert len(run("ls", "-lU", guest, cwd=host).splitlines()) == 3001
    shutil.rmtree(guest, ignore_errors=True)  # the mount point itself stays
    assert names(host) == []


def test_git_and_a_shell_work_in_memory(mount_of: Callable[[Provider], Path]) -> None:
    path = mount_of(Memory())
    (path / "work").mkdir()

    run("git", "init", "-q", "-b", "main", ".", cwd=path / "work")
    (path / "work" / "file").write_text("text")
    run("git", "add", ".", cwd=path / "work")
    run("git", "commit", "-qm", "one", cwd=path / "work")
    run("sh", "-c", "mkfifo f; (echo through > f &); read x < f; test $x = through", cwd=path)
    run("cp", "-a", path / "work", path / "copy", cwd=path)

    assert run("git", "fsck", "--strict", cwd=path / "copy") == ""
    assert run("diff", "-r", "work", "copy", cwd=path) == ""
    run("rm", "-rf", "work", "copy", "f", cwd=path)
    assert names(path) == []


def test_git_works_on_both_sides(guest: Path, host: Path) -> None:
    run("git", "init", "-q", "-b", "main", ".", cwd=guest)
    for number in range(40):
        (guest / f"file{number}").write_text(f"{number}\n" * number)
    run("git", "add", ".", cwd=guest)
    run("git", "commit", "-qm", "one", cwd=guest)
    run("git", "checkout", "-qb", "other", cwd=guest)
    (guest / "file3").write_text("changed")
    run("git", "commit", "-qam", "two", cwd=guest)
    run("git", "checkout", "-q", "main", cwd=guest)
    run("git", "merge", "-q", "other", cwd=guest)
    run("git", "gc", "-q", cwd=guest)

    assert run("git", "status", "--porcelain", cwd=guest) == ""
    # The guest's index, with its inode numbers and times, is believed by the host as it is.
    assert run("git", "diff-files", "--name-only", cwd=host) == ""
    assert run("git", "fsck", "--strict", cwd=host) == ""
    run("git", "clone", "-q", guest, guest / "clone", cwd=guest)
    assert (host / "clone" / "file3").read_text() == "changed"


def test_copies_keep_everything(guest: Path, host: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "file").write_bytes(os.urandom(100_000))
    (source / "deep" / "link").symlink_to("er/file")
    (source / "deep" / "hard").hardlink_to(source / "deep" / "er" / "file")
    (source / "locked").touch(mode=0o400)

    run("cp", "-a", source, guest / "copy", cwd=tmp_path)
    run("tar", "-C", guest, "-cf", guest / "a.tar", "copy", cwd=tmp_path)
    (guest / "out").mkdir()
    run("tar", "-C", guest / "out", "-xf", guest / "a.tar", cwd=tmp_path)

    assert run("diff", "-r", source, host / "out" / "copy", cwd=tmp_path) == ""
    assert (host / "copy/deep/hard").stat().st_nlink == 2
    assert (host / "out/copy/deep/hard").samefile(host / "out/copy/deep/er/file")
    assert (host / "copy/locked").stat().st_mode == source.joinpath("locked").stat().st_mode
    run("rm", "-rf", guest / "copy", guest / "out", cwd=tmp_path)
    assert names(host) == ["a.tar"]


def test_python_and_its_caches_work(guest: Path) -> None:
    (guest / "package").mkdir()
    (guest / "package" / "__init__.py").write_text("from package import inner\n")
    (guest / "package" / "inner.py").write_text("value = 41\n")
    program = "import package; print(package.inner.value + 1)"

    first = run(sys.executable, "-c", program, cwd=guest)
    second = run(sys.executable, "-c", program, cwd=guest)

    assert (first, second) == ("42\n", "42\n")
    assert len(list((guest / "package" / "__pycache__").iterdir())) == 2


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_sqlite_works(guest: Path, host: Path, mode: str) -> None:
    program = (
        "import sqlite3\n"
        "database = sqlite3.connect('test.db')\n"
        f"database.execute('pragma journal_mode={mode}')\n"
        "database.execute('create table t (a integer primary key, b blob)')\n"
        "for _ in range(20):\n"
        "    with database:\n"
        "        database.execute('insert into t (b) values (randomblob(5000))')\n"
    )
    run(sys.executable, "-c", program, cwd=guest)

    with closing(sqlite3.connect(host / "test.db")) as copy:
        assert copy.execute("select count(*), sum(length(b)) from t").fetchone() == (20, 100_000)
        assert copy.execute("pragma integrity_check").fetchone() == ("ok",)


def test_an_unlinked_file_lives_until_it_is_closed(guest: Path, host: Path) -> None:
    with open(guest / "file", "w+b") as file:
        file.write(b"before")
        file.flush()
        (guest / "file").unlink()
        assert names(host) == []
        file.write(b" and after")
        file.flush()
        file.seek(0)
        assert file.read() == b"before and after"
        assert os.fstat(file.fileno()).st_size == 16
        os.ftruncate(file.fileno(), 3)
        assert os.fstat(file.fileno()).st_size == 3


def test_a_file_that_was_renamed_over_lives_until_it_is_closed(guest: Path) -> None:
    (guest / "old").write_bytes(b"old")
    (guest / "new").write_bytes(b"new")
    with open(guest / "old", "rb") as file:
        (guest / "new").rename(guest / "old")
        assert file.read() == b"old"
    assert (guest / "old").read_bytes() == b"new"


def test_a_deleted_working_directory_is_no_error(guest: Path) -> None:
    script = "mkdir d && cd d && rmdir ../d && ls -la . >/dev/null; cd .. && ls"
    assert run("sh", "-c", script, cwd=guest) == ""


def test_exclusive_creation_excludes(guest: Path) -> None:
    os.close(os.open(guest / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with pytest.raises(FileExistsError):
        os.open(guest / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_umask_of_the_guest_alone_counts(guest: Path, host: Path, umask: int) -> None:
    script = f"umask {umask:o}; touch file; mkdir directory"
    run("sh", "-c", script, cwd=guest)

    assert stat.S_IMODE((host / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((host / "directory").stat().st_mode) == 0o777 & ~umask


def test_renames_with_flags(guest: Path, host: Path) -> None:
    (guest / "a").write_text("a")
    (guest / "b").write_text("b")
    noreplace, exchange = 1, 2

    def rename(flags: int) -> int:
        at, a, b = -100, os.fsencode(guest / "a"), os.fsencode(guest / "b")
        return ctypes.get_errno() if libc.renameat2(at, a, at, b, flags) else 0

    assert rename(noreplace) == errno.EEXIST
    assert rename(exchange) == 0
    assert ((host / "a").read_text(), (guest / "a").read_text()) == ("b", "b")
    assert ((host / "b").read_text(), (guest / "b").read_text()) == ("a", "a")


def test_appending_goes_to_the_end_that_the_host_sees(guest: Path, host: Path) -> None:
    with open(guest / "log", "ab", buffering=0) as log:
        log.write(b"guest 1\n")
        with open(host / "log", "ab", buffering=0) as same:
            same.write(b"host 1\n")
        log.write(b"guest 2\n")
    assert (host / "log").read_bytes() == b"guest 1\nhost 1\nguest 2\n"


def test_holes_and_preallocation(guest: Path, host: Path) -> None:
    with open(guest / "file", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 10_000)
        assert os.fstat(file.fileno()).st_size == 10_000
        os.ftruncate(file.fileno(), 1 << 20)
        os.pwrite(file.fileno(), b"x", 1 << 19)
    with open(guest / "file", "rb") as file:
        assert os.lseek(file.fileno(), 1 << 18, os.SEEK_DATA) <= 1 << 19
    assert (host / "file").stat().st_size == 1 << 20


def test_shared_mappings_reach_the_host(guest: Path, host: Path) -> None:
    (guest / "file").write_bytes(b"a" * 8192)
    # In another process: a page fault here would wait, with the interpreter's lock, for our own server.
    program = (
        "import mmap\n"
        "with open('file', 'r+b') as file, mmap.mmap(file.fileno(), 0) as view:\n"
        "    view[4000:4010] = b'0123456789'\n"
        "    view.flush()\n"
    )
    run(sys.executable, "-c", program, cwd=guest)
    assert (host / "file").read_bytes()[3999:4011] == b"a0123456789a"


def test_user_attributes_pass_and_others_do_not(guest: Path, host: Path) -> None:
    (guest / "file").touch()

    os.setxattr(guest / "file", "user.colour", b"blue")

    assert os.getxattr(host / "file", "user.colour") == b"blue"
    os.setxattr(host / "file", "trusted.hidden", b"1")
    assert os.listxattr(guest / "file") == ["user.colour"]
    os.removexattr(guest / "file", "user.colour")
    assert os.listxattr(host / "file") == ["trusted.hidden"]
    with pytest.raises(OSError, match="not supported"):
        os.setxattr(guest / "file", "security.capability", b"\1\0\0\2" + bytes(16))


def test_times_can_be_set_one_by_one(guest: Path, host: Path) -> None:
    (guest / "file").touch()
    (guest / "link").symlink_to("file")

    os.utime(guest / "file", ns=(-5_000_000_001, 77_000_000_009))
    run("touch", "-a", "-d", "@5", guest / "file", cwd=guest)
    os.utime(guest / "link", ns=(1, 2), follow_symlinks=False)

    assert (host / "file").stat().st_atime_ns == 5_000_000_000
    assert (host / "file").stat().st_mtime_ns == 77_000_000_009
    assert (host / "link").lstat().st_mtime_ns == 2
    assert str((guest / "link").readlink()) == "file"


def test_owners_stay(guest: Path) -> None:
    (guest / "file").touch()

    os.chown(guest / "file", os.getuid(), os.getgid())

    with pytest.raises(PermissionError):
        os.chown(guest / "file", 12345, -1)


def test_changes_of_the_host_show_within_the_lifetime(guest: Path, host: Path) -> None:
    (host / "file").write_text("one")
    assert (guest / "file").read_text() == "one"
    (host / "replaced").write_text("one")
    assert (guest / "replaced").read_text() == "one"

    (host / "file").write_text("two, in place")
    (host / "new").write_text("two")
    (host / "new").rename(host / "replaced")
    (host / "link").symlink_to("nowhere")

    assert eventually(lambda: (guest / "file").read_text() == "two, in place")
    assert eventually(lambda: (guest / "replaced").read_text() == "two")
    assert eventually(lambda: names(guest) == ["file", "link", "replaced"])


def test_a_symbolic_link_that_the_host_replaced_is_read_anew(guest: Path, host: Path) -> None:
    for number in range(5):  # the inode number of the one before is free again
        (host / "link").unlink(missing_ok=True)
        (host / "link").symlink_to(f"target{number}")
        if number < 2:
            assert eventually(lambda at=number: str((guest / "link").readlink()) == f"target{at}")
    assert eventually(lambda: str((guest / "link").readlink()) == "target4")


def test_locks_of_the_guest_exclude_each_other(guest: Path) -> None:
    with open(guest / "file", "w") as first, open(guest / "file") as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_read_only_mount_reads(mount_of: Callable[[Provider], Path], host: Path) -> None:
    (host / "file").write_text("text")
    path = mount_of(HostDir(host, mode="ro"))

    assert (path / "file").read_text() == "text"
    for attempt in (
        lambda: (path / "new").touch(),
        lambda: (path / "file").write_text("x"),
        lambda: (path / "file").unlink(),
        lambda: (path / "file").chmod(0o777),
        lambda: os.truncate(path / "file", 0),
    ):
        with pytest.raises(OSError, match="Read-only"):
            attempt()
    assert (host / "file").read_text() == "text"


def test_many_processes_at_once(guest: Path, host: Path) -> None:
    script = (
        "for i in 1 2 3 4 5 6 7 8; do (for j in $(seq 20); do echo $i > f$i.$j;"
        " mv f$i.$j g$i.$j; cat g$i.$j > /dev/null; done) & done; wait; cat g* | wc -l"
    )
    assert run("sh", "-c", script, cwd=guest).strip() == "160"
    assert len(names(host)) == 160


def test_a_very_deep_tree(guest: Path, host: Path) -> None:
    program = (
        "import os\n"
        "for i in range(300):\n"
        "    os.mkdir('d' * 20); os.chdir('d' * 20)\n"
        "open('leaf', 'w').write('deep'); print(open('leaf').read())"
    )
    assert run(sys.executable, "-c", program, cwd=guest) == "deep\n"
    run("rm", "-rf", guest / ("d" * 20), cwd=guest)
    assert names(host) == []


def test_fifos_and_sockets_are_the_guests_alone(guest: Path, host: Path) -> None:
    program = (
        "import os, socket, stat\n"
        "os.mkdir('d'); os.mkfifo('d/fifo', 0o600)\n"
        "listener = socket.socket(socket.AF_UNIX); listener.bind('d/sock'); listener.listen()\n"
        "os.rename('d/sock', 'd/moved'); os.chmod('d/moved', 0o666)\n"
        "client = socket.socket(socket.AF_UNIX); client.connect('d/moved'); listener.accept()\n"
        "assert sorted(os.listdir('d')) == ['fifo', 'moved'], os.listdir('d')\n"
        "assert stat.S_ISFIFO(os.stat('d/fifo').st_mode)\n"
        "assert os.stat('d/moved').st_mode == stat.S_IFSOCK | 0o666\n"
        "if os.fork() == 0:\n"
        "    open('d/fifo', 'w').write('through'); os._exit(0)\n"
        "assert open('d/fifo').read() == 'through'\n"
        "try: os.rmdir('d')\n"
        "except OSError as error: print(error.errno)\n"
        "open('d/file', 'w').close(); os.rename('d/file', 'd/fifo')\n"
        "os.unlink('d/moved')\n"
        "print(os.listdir('d'))\n"
    )

    assert run(sys.executable, "-c", program, cwd=guest) == f"{errno.ENOTEMPTY}\n['fifo']\n"
    assert names(host / "d") == ["fifo"]
    assert (host / "d" / "fifo").is_file()
