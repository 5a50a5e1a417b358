"""The part of the conformance tests (fs/conformance.py) about contents and attributes."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable

from taskvm.fs.conformance_harness import NOTHING, Harness, refused
from taskvm.wire.fuse import SetAttrField

KEEP_SIZE, PUNCH_HOLE = 1, 2  # fallocate(2)


class ContentTests(Harness):
    """What is written is read, and nothing else."""

    def test_contents_are_padded_appended_and_cut(self) -> None:
        file = self._file(b"file", b"data").node

        self.provider.write(file, 6, memoryview(b"far"), append=False)
        assert self.provider.read(file, 0, 100) == b"data\0\0far"
        self.provider.write(file, 0, memoryview(b"!"), append=True)
        assert self.provider.read(file, 8, 100) == b"r!"
        assert self.provider.read(file, 2, 3) == b"ta\0"
        assert self.provider.read(file, 100, 10) == b""
        assert self._set(file, SetAttrField.SIZE, size=2) == 2
        assert self._set(file, SetAttrField.SIZE, size=5) == 5
        assert self.provider.read(file, 0, 100) == b"da\0\0\0"
        self.provider.fsync(file, data_only=False)

    def test_large_contents_keep_every_byte(self) -> None:
        file, data = self._file(b"file").node, random.Random(1).randbytes(3_000_000)

        for offset in range(0, len(data), 1 << 20):
            piece = memoryview(data)[offset : offset + (1 << 20)]
            assert self.provider.write(file, offset, piece, append=False) == len(piece)

        read = b"".join(
            self.provider.read(file, at, 1 << 17) for at in range(0, len(data), 1 << 17)
        )
        assert read == data

    def test_only_files_have_contents(self) -> None:
        with refused(errno.EISDIR):
            self.provider.read(self.root, 0, 10)
        with refused(errno.EISDIR):
            self.provider.write(self.root, 0, memoryview(b"x"), append=False)

    def test_what_was_written_is_not_held(self) -> None:
        """Rule 4: a buffer can be used again as soon as the call is over."""
        buffer = bytearray(b"data")

        self.provider.write(self._file(b"file").node, 0, memoryview(buffer), append=False)

        buffer.clear()  # BufferError while anyone holds it
        assert self.provider.read(self.provider.lookup(self.root, b"file").node, 0, 10) == b"data"

    def test_data_is_sought_and_copied_as_asked_or_refused(self) -> None:
        file, other = self._file(b"file", b"data").node, self._file(b"other").node

        attempts: tuple[tuple[Callable[[], object], object], ...] = (
            (lambda: self.provider.seek(file, 0, os.SEEK_DATA), 0),
            (lambda: self.provider.seek(file, 0, os.SEEK_HOLE), 4),
            (lambda: self.provider.copy_range(file, 1, other, 0, 3), 3),
        )
        for attempt, expected in attempts:
            try:
                assert attempt() == expected
            except OSError as error:
                assert error.errno in NOTHING  # noqa: PT017 - no pytest here
        assert self.provider.read(other, 0, 10) in (b"ata", b"")

    def test_space_is_reserved_and_freed_as_fallocate_does_or_refused(self) -> None:
        file = self._file(b"file", b"data" * 4096).node
        allocate, size = self.provider.allocate, 4 * 4096

        for mode, offset, length, expected in (
            (0, size, 100, size + 100),
            (0, 0, 10, size + 100),  # what is there stays
            (KEEP_SIZE, 1 << 20, 4096, size + 100),
            (KEEP_SIZE | PUNCH_HOLE, 4096, 4096, size + 100),
        ):
            try:
                allocate(file, offset, length, mode)
            except OSError as error:
                assert error.errno in NOTHING  # noqa: PT017 - no pytest here
                expected = self.provider.getattr(file)[0].st_size
            assert self.provider.getattr(file)[0].st_size == expected
        read = self.provider.read(file, 0, 1 << 20)
        assert read[:4096] == b"data" * 1024
        assert read[4096:8192] in (b"data" * 1024, bytes(4096))
        assert read[8192:size] == b"data" * 2048
        assert not any(read[size:])
        with refused(*NOTHING, errno.EINVAL):
            allocate(file, 0, 4096, PUNCH_HOLE)  # never without KEEP_SIZE
        with refused(*NOTHING, errno.EISDIR, errno.EINVAL, errno.ENODEV, errno.EBADF):
            allocate(self.root, 0, 4096, 0)

    # Attributes.

    def test_set_id_bits_are_never_set(self) -> None:
        file = self.provider.create(self.root, b"file", 0o6755, 0).node
        directory = self.provider.mkdir(self.root, b"directory", 0o6755).node
        if self.modes:
            self._set(file, SetAttrField.MODE, mode=0o6777)

        for node in (file, directory):
            assert not self.provider.getattr(node)[0].st_mode & (stat.S_ISUID | stat.S_ISGID)

    def test_permissions_and_times_are_kept(self) -> None:
        if not self.modes:
            return
        file = self._file(b"file").node

        self._set(file, SetAttrField.MODE, mode=0o640)
        self._set(file, SetAttrField.ATIME | SetAttrField.MTIME, atime_ns=1_000, mtime_ns=2_000)

        attr = self.provider.getattr(file)[0]
        assert stat.S_IMODE(attr.st_mode) == 0o640
        assert (attr.st_atime_ns, attr.st_mtime_ns) == (1_000, 2_000)
        self._set(file, SetAttrField.MTIME | SetAttrField.MTIME_NOW)
        assert self.provider.getattr(file)[0].st_mtime_ns > 2_000

    def test_owners_are_not_changed(self) -> None:
        file = self._file(b"file").node
        uid = self.provider.getattr(file)[0].st_uid

        with refused(errno.EPERM):
            self._set(file, SetAttrField.UID, uid=uid + 1)

    def test_attributes_of_users_are_kept_and_no_others(self) -> None:
        if not self.provider.xattrs:
            return
        file = self._file(b"file").node

        self.provider.setxattr(file, b"user.a", b"1", 0)
        assert self.provider.getxattr(file, b"user.a") == b"1"
        assert self.provider.listxattr(file) == [b"user.a"]
        with refused(errno.EEXIST):
            self.provider.setxattr(file, b"user.a", b"2", os.XATTR_CREATE)
        with refused(errno.ENODATA):
            self.provider.setxattr(file, b"user.b", b"2", os.XATTR_REPLACE)
        self.provider.removexattr(file, b"user.a")
        with refused(errno.ENODATA):
            self.provider.getxattr(file, b"user.a")
        with refused(errno.EOPNOTSUPP):
            self.provider.setxattr(file, b"security.capability", bytes(20), 0)

    def test_a_file_system_tells_its_size(self) -> None:
        told = self.provider.statfs(self.root)

        assert 0 <= told.available <= told.blocks
        assert min(told.block_size, told.fragment_size, told.max_name) > 0
