"""Runs in a guest, in a mounted directory: what programs of Linux rely on, one function for each claim. Prints JSON.

Each function gets a new directory; what it raises is the reason why the claim does not hold. Nothing here is imported
by a test: it is copied into the guest.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import select
import socket
import stat
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, NOREPLACE, EXCHANGE = -100, 1, 2
KEEP_SIZE, PUNCH_HOLE = 1, 2
GIB = 1 << 30


def refused(number: int, call: Callable[..., object], *arguments: object) -> None:
    """Claim that the call fails with this errno."""
    number_got = 0
    try:
        call(*arguments)
    except OSError as error:
        number_got = error.errno or 0
    assert number_got == number, errno.errorcode.get(number_got, "not refused")


def create(path: Path, flags: int, mode: int = 0o666) -> int:
    return os.open(path, os.O_CREAT | flags, mode)


def exclusive_creation_and_the_umask(at: Path) -> None:
    os.umask(0o027)
    os.close(create(at / "file", os.O_EXCL | os.O_WRONLY))
    refused(errno.EEXIST, create, at / "file", os.O_EXCL | os.O_WRONLY)
    assert stat.S_IMODE((at / "file").stat().st_mode) == 0o640
    os.umask(0o022)


def a_file_may_be_written_that_was_created_without_the_right(at: Path) -> None:
    fd = create(at / "file", os.O_EXCL | os.O_WRONLY, 0o400)
    os.write(fd, b"written")
    os.close(fd)
    assert (at / "file").read_bytes() == b"written"


def truncation(at: Path) -> None:
    (at / "file").write_bytes(b"0123456789")
    os.truncate(at / "file", 4)
    assert (at / "file").read_bytes() == b"0123"
    os.truncate(at / "file", 8)
    assert (at / "file").read_bytes() == b"0123\0\0\0\0"
    os.close(os.open(at / "file", os.O_WRONLY | os.O_TRUNC))
    assert (at / "file").stat().st_size == 0


def modes(at: Path) -> None:
    (at / "file").touch()
    for mode in (0o755, 0o444, 0o600, 0o777):
        (at / "file").chmod(mode)
        assert stat.S_IMODE((at / "file").stat().st_mode) == mode
    (at / "sticky").mkdir()
    (at / "sticky").chmod(0o1777)
    assert (at / "sticky").stat().st_mode & stat.S_ISVTX


def set_id_bits_are_not_kept(at: Path) -> None:
    (at / "file").touch()
    (at / "file").chmod(0o6755)
    assert not (at / "file").stat().st_mode & (stat.S_ISUID | stat.S_ISGID)


def times_to_the_nanosecond(at: Path) -> None:
    (at / "file").touch()
    (at / "link").symlink_to("file")
    os.utime(at / "file", ns=(1_234_567_890_123_456_789, 987_654_321_987_654_321))
    status = (at / "file").stat()
    assert (status.st_atime_ns, status.st_mtime_ns) == (
        1_234_567_890_123_456_789,
        987_654_321_987_654_321,
    )
    os.utime(at / "link", ns=(1, 2), follow_symlinks=False)
    assert (at / "link").lstat().st_mtime_ns == 2
    assert (at / "file").stat().st_mtime_ns == 987_654_321_987_654_321


def owners(at: Path) -> None:
    (at / "file").touch()
    status = (at / "file").stat()
    assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
    os.chown(at / "file", status.st_uid, status.st_gid)
    os.chown(at / "file", -1, -1)
    refused(errno.EPERM, os.chown, at / "file", 12345, -1)


def renames(at: Path) -> None:
    (at / "a").write_text("a")
    (at / "b").write_text("b")

    def rename(old: Path, new: Path, flags: int) -> int:
        failed = libc.renameat2(AT_FDCWD, bytes(old), AT_FDCWD, bytes(new), flags)
        return ctypes.get_errno() if failed else 0

    assert rename(at / "a", at / "b", NOREPLACE) == errno.EEXIST
    assert rename(at / "a", at / "c", NOREPLACE) == 0
    assert rename(at / "c", at / "b", EXCHANGE) == 0
    assert ((at / "b").read_text(), (at / "c").read_text()) == ("a", "b")
    (at / "full").mkdir()
    (at / "full" / "x").touch()
    (at / "empty").mkdir()
    refused(errno.ENOTEMPTY, os.rename, at / "empty", at / "full")
    (at / "full").rename(at / "empty")
    assert (at / "empty" / "x").exists()
    refused(errno.EINVAL, os.rename, at / "empty", at / "empty" / "inside")


def hard_links(at: Path) -> None:
    (at / "one").write_text("text")
    os.link(at / "one", at / "two")
    assert (at / "one").stat().st_nlink == (at / "two").stat().st_nlink == 2
    assert (at / "one").samefile(at / "two")
    (at / "two").write_text("through two")
    assert (at / "one").read_text() == "through two"
    (at / "one").unlink()
    assert (at / "two").stat().st_nlink == 1


def symbolic_links(at: Path) -> None:
    for target in ("nowhere", "/etc/hostname", "a" * 4000, "with\nnewline"):
        (at / "link").symlink_to(target)
        assert str((at / "link").readlink()) == target
        assert (at / "link").lstat().st_size == len(target)
        (at / "link").unlink()
    (at / "loop").symlink_to("loop")
    refused(errno.ELOOP, os.stat, at / "loop")
    refused(errno.ELOOP, os.open, at / "loop", os.O_RDONLY | os.O_NOFOLLOW)


def an_unlinked_file_lives_while_it_is_open(at: Path) -> None:
    fd = create(at / "file", os.O_RDWR)
    os.write(fd, b"before ")
    (at / "file").unlink()
    assert list(at.iterdir()) == []
    os.write(fd, b"after")
    assert os.pread(fd, 100, 0) == b"before after"
    assert os.fstat(fd).st_nlink == 0
    os.ftruncate(fd, 3)
    assert os.fstat(fd).st_size == 3
    os.close(fd)


def appending(at: Path) -> None:
    first, second = (create(at / "log", os.O_WRONLY | os.O_APPEND) for _ in range(2))
    for number in range(50):
        os.write((first, second)[number % 2], b"%02d\n" % number)
    assert (at / "log").read_bytes() == b"".join(b"%02d\n" % number for number in range(50))


def allocation_and_holes(at: Path) -> None:
    fd = create(at / "file", os.O_RDWR)
    os.posix_fallocate(fd, 0, 1 << 20)
    assert os.fstat(fd).st_size == 1 << 20
    offset, length = ctypes.c_long(1 << 16), ctypes.c_long(1 << 16)
    os.pwrite(fd, b"x" * (1 << 20), 0)
    assert libc.fallocate(fd, KEEP_SIZE | PUNCH_HOLE, offset, length) == 0, ctypes.get_errno()
    assert os.pread(fd, 4, 1 << 16) == bytes(4)
    os.fsync(fd)
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 1 << 16
    assert os.lseek(fd, 1 << 16, os.SEEK_DATA) == 1 << 17
    os.close(fd)


def files_beyond_four_gigabytes(at: Path) -> None:
    fd = create(at / "sparse", os.O_RDWR)
    os.pwrite(fd, b"far", 5 * GIB)
    os.fsync(fd)
    assert os.fstat(fd).st_size == 5 * GIB + 3
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    assert os.pread(fd, 10, 5 * GIB) == b"far"
    assert os.lseek(fd, 0, os.SEEK_DATA) >= 5 * GIB - 4096
    os.close(fd)


def copies_within_the_host(at: Path) -> None:
    (at / "from").write_bytes(os.urandom(3_000_000))
    source, target = os.open(at / "from", os.O_RDONLY), create(at / "to", os.O_WRONLY)
    left = 3_000_000
    while left:
        left -= os.copy_file_range(source, target, left)
    os.close(target)
    assert (at / "to").read_bytes() == (at / "from").read_bytes()


def extended_attributes(at: Path) -> None:
    (at / "file").touch()
    os.setxattr(at / "file", "user.one", b"1")
    os.setxattr(at / "file", "user.binary", bytes(range(256)))
    assert sorted(os.listxattr(at / "file")) == ["user.binary", "user.one"]
    assert os.getxattr(at / "file", "user.binary") == bytes(range(256))
    refused(errno.EEXIST, os.setxattr, at / "file", "user.one", b"", os.XATTR_CREATE)
    os.removexattr(at / "file", "user.one")
    refused(errno.ENODATA, os.getxattr, at / "file", "user.one")
    refused(errno.ENOTSUP, os.getxattr, at / "file", "security.capability")


def locks_within_the_guest(at: Path) -> None:
    with (at / "file").open("w+") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        fcntl.lockf(mine, fcntl.LOCK_EX)
        program = (
            "import fcntl, sys\nfile = open(sys.argv[1], 'r+')\n"
            "for lock in (fcntl.flock, fcntl.lockf):\n"
            "    try: lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "    except BlockingIOError: print('held')\n"
        )
        other = [sys.executable, "-c", program, str(at / "file")]
        assert subprocess.check_output(other, text=True) == "held\nheld\n"
    assert subprocess.check_output(other, text=True) == ""


def the_size_of_the_file_system(at: Path) -> None:
    status = os.statvfs(at)
    assert status.f_blocks > status.f_bfree > 0
    assert status.f_namemax == 255


def shared_mappings(at: Path) -> None:
    (at / "file").write_bytes(bytes(3 * 4096))
    with (at / "file").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[4096:4101] = b"there"
        mapped.flush()
        os.pwrite(file.fileno(), b"here", 0)
        assert mapped[:4] == b"here"
    assert (at / "file").read_bytes()[4096:4101] == b"there"


def fifos(at: Path) -> None:
    os.mkfifo(at / "fifo", 0o600)
    assert (at / "fifo").is_fifo()
    script = "echo through > fifo & read line < fifo; echo $line"
    assert subprocess.check_output(["sh", "-c", script], cwd=at, text=True) == "through\n"
    (at / "fifo").rename(at / "moved")
    assert [path.name for path in at.iterdir()] == ["moved"]


def unix_sockets(at: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        os.chdir(at)
        server.bind("socket")
        server.listen()
        client.connect("socket")
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"hello")
            assert accepted.recv(10) == b"hello"


def devices_are_refused(at: Path) -> None:
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        refused(errno.EPERM, os.mknod, at / "device", kind | 0o600, os.makedev(1, 3))


def a_listing_is_stable_while_the_directory_changes(at: Path) -> None:
    kept = {f"kept{number:04}" for number in range(600)}
    for name in kept:
        (at / name).touch()
    listed = []
    with os.scandir(at) as entries:
        for number, entry in enumerate(entries):
            listed.append(entry.name)
            if number % 3 == 0:
                (at / f"new{number}").touch()
                (at / f"new{number}").unlink()
    seen = [name for name in listed if name in kept]
    assert len(seen) == len(set(seen)) == len(kept)


def names_of_any_bytes(at: Path) -> None:
    names = [b"n" * 255, b"\xff\xfe", b"new\nline", b" ", b"-rf", b"*", b"\\", "日本語".encode()]
    for name in names:
        os.close(os.open(bytes(at) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    assert sorted(os.listdir(bytes(at))) == sorted(names)  # noqa: PTH208 - bytes
    refused(errno.ENAMETOOLONG, os.mkdir, at / ("n" * 256))


def programs_run(at: Path) -> None:
    (at / "script").write_text("#!/bin/sh\necho ran\n")
    (at / "script").chmod(0o755)
    assert subprocess.check_output([at / "script"], text=True) == "ran\n"
    (at / "script").chmod(0o644)
    refused(errno.EACCES, subprocess.check_output, [at / "script"])


def changes_are_noticed(at: Path) -> None:
    fd = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(fd, bytes(at), 0x100 | 0x2 | 0x200) >= 0
    (at / "file").write_text("x")
    (at / "file").unlink()
    assert select.select([fd], [], [], 5)[0]
    masks, data = [], os.read(fd, 4096)
    while data:
        _wd, mask, _cookie, length = struct.unpack_from("iIII", data)
        masks.append(mask)
        data = data[16 + length :]
    assert (masks[0], masks[-1]) == (0x100, 0x200)
    os.close(fd)


def a_removed_working_directory_is_no_error(at: Path) -> None:
    script = "mkdir d && cd d && rmdir ../d && ls -la . > /dev/null; cd .. && ls"
    assert subprocess.check_output(["sh", "-c", script], cwd=at, text=True) == ""


CLAIMS = [
    value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__annotations__", {}).keys() == {"at", "return"}
]


def main(root: Path) -> dict[str, str]:
    outcome = {}
    for claim in CLAIMS:
        name = claim.__name__
        at = root / name
        at.mkdir()
        try:
            claim(at)
        except Exception:  # noqa: BLE001 - the reason is the result
            outcome[name] = traceback.format_exc()
        else:
            outcome[name] = ""
    return outcome


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
