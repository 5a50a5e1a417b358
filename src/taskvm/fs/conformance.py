"""What every provider must do, as tests that need no guest: for your own providers as for ours. Run them with pytest:

    class TestMine(ProviderConformance):
        def make(self, directory: Path) -> Provider:
            return Mine(directory)

Each test gets a new, empty provider; `directory` is an empty directory of the host, for those that need one. What a
provider does not have is said by the class: `links = False`. What it refuses it must refuse with the errno named here.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from taskvm.fs.provider import ROOT, DirEntry, Entry, Node, Provider
from taskvm.fs.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from taskvm.wire.fuse import SetAttr, SetAttrField

_UNKNOWN_NODE = 2**40
_LEAST_READDIR = 1024  # nobody asks for less
_MOST_NAMES = 10_000  # more than any test makes
_NOTHING = (errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """Expect an OSError with one of these errnos."""
    expected = "|".join(errno.errorcode[number] for number in numbers)
    try:
        yield
    except OSError as error:
        got = errno.errorcode.get(error.errno or 0, str(error.errno))
        assert error.errno in numbers, f"expected {expected}, got {got}"  # noqa: PT017 - no pytest here
    else:
        raise AssertionError(f"expected {expected}, and nothing was refused")


class ProviderConformance:
    """The contract of taskvm.Provider (fs/provider.py) as a class of tests. Subclass it and override `make`."""

    links = True
    symlinks = True
    renames = True
    orphans = True
    """Whether a removed file lives on for who has it open."""
    modes = True
    """Whether permissions and times can be set and are kept."""

    provider: Provider

    def make(self, directory: Path) -> Provider:
        """Return a new, empty, writable provider."""
        raise NotImplementedError("override make()")

    def find_root(self) -> Node:
        """Return the directory of `provider` that the tests work in."""
        return ROOT

    def setup_method(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="taskvm-conformance-"))
        self.provider = self.make(self._directory).opened()
        self.root = self.find_root()

    def teardown_method(self) -> None:
        self.provider.close()
        self.provider.close()  # idempotent
        shutil.rmtree(self._directory)

    # Names.

    def test_a_new_tree_is_an_empty_directory(self) -> None:
        assert self._names() == []
        assert stat.S_ISDIR(self.provider.getattr(self.root)[0].st_mode)

    def test_what_is_created_is_found_under_its_name(self) -> None:
        made = self._file(b"file", b"data")

        found = self.provider.lookup(self.root, b"file")
        assert (found.node, found.attr.st_size) == (made.node, 4)
        assert stat.S_ISREG(found.attr.st_mode)
        assert self.provider.getattr(made.node)[0].st_ino == found.attr.st_ino

    def test_creation_excludes_and_truncates_as_it_is_told(self) -> None:
        made = self._file(b"file", b"data")

        with refused(errno.EEXIST):
            self.provider.create(self.root, b"file", 0o644, os.O_EXCL)
        assert self.provider.create(self.root, b"file", 0o644, 0).node == made.node
        assert self.provider.read(made.node, 0, 10) == b"data"
        assert self.provider.create(self.root, b"file", 0o644, os.O_TRUNC).attr.st_size == 0

    def test_every_byte_but_nul_and_slash_may_be_in_a_name(self) -> None:
        for name in (b"a b", b"\n", "ä€😀".encode(), b"-", b"...", b"x" * 255):
            self._file(name)
        assert len(self._names()) == 6
        with refused(errno.ENAMETOOLONG):
            self.provider.create(self.root, b"x" * 256, 0o644, 0)
        with refused(errno.ENAMETOOLONG, errno.ENOENT):
            self.provider.lookup(self.root, b"x" * 256)

    def test_what_is_missing_or_in_the_way_is_said(self) -> None:
        file, directory = self._file(b"file"), self._directory_named(b"directory")
        self._file(b"inner", parent=directory.node)

        with refused(errno.ENOENT):
            self.provider.lookup(self.root, b"missing")
        with refused(errno.ENOTDIR, errno.ESTALE):
            self.provider.lookup(file.node, b"below")
        with refused(errno.EEXIST):
            self.provider.mkdir(self.root, b"file", 0o755)
        with refused(errno.ENOENT):
            self.provider.unlink(self.root, b"missing")
        with refused(errno.EISDIR, errno.EPERM):
            self.provider.unlink(self.root, b"directory")
        with refused(errno.ENOTDIR):
            self.provider.rmdir(self.root, b"file")
        with refused(errno.ENOTEMPTY):
            self.provider.rmdir(self.root, b"directory")

    def test_what_is_removed_is_gone(self) -> None:
        self._file(b"file")
        self._directory_named(b"directory")

        self.provider.unlink(self.root, b"file")
        self.provider.rmdir(self.root, b"directory")

        assert self._names() == []
        for name in (b"file", b"directory"):
            with refused(errno.ENOENT):
                self.provider.lookup(self.root, name)

    def test_devices_are_not_made(self) -> None:
        for kind in (stat.S_IFCHR, stat.S_IFBLK):
            with refused(errno.EPERM):
                self.provider.mknod(self.root, b"device", kind | 0o600)
        assert self._names() == []

    def test_hard_links_are_one_node(self) -> None:
        if not self.links:
            return
        file = self._file(b"file", b"data")

        link = self.provider.link(file.node, self.root, b"link")

        assert (link.node, link.attr.st_nlink) == (file.node, 2)
        self.provider.unlink(self.root, b"file")
        assert self.provider.read(self.provider.lookup(self.root, b"link").node, 0, 10) == b"data"
        with refused(errno.EEXIST):
            self.provider.link(link.node, self.root, b"link")
        with refused(errno.EPERM):
            self.provider.link(self._directory_named(b"directory").node, self.root, b"other")

    def test_the_target_of_a_symbolic_link_is_data(self) -> None:
        if not self.symlinks:
            return
        for number, target in enumerate((b"../../etc/passwd", b"/", b"\xff", b"x" * 1000)):
            link = self.provider.symlink(self.root, b"link%d" % number, target)
            assert stat.S_ISLNK(link.attr.st_mode)
            assert self.provider.readlink(link.node) == target
        with refused(errno.EINVAL):
            self.provider.readlink(self._file(b"file").node)

    # Renames.

    def test_a_rename_moves_and_replaces(self) -> None:
        if not self.renames:
            return
        moved, directory = self._file(b"a", b"moved"), self._directory_named(b"directory")
        self._file(b"b", b"replaced", parent=directory.node)

        self.provider.rename(self.root, b"a", directory.node, b"b", 0)

        assert self._names() == [b"directory"]
        found = self.provider.lookup(directory.node, b"b")
        assert (found.node, self.provider.read(found.node, 0, 10)) == (moved.node, b"moved")

    def test_what_is_in_a_directory_moves_along(self) -> None:
        if not self.renames:
            return
        outer = self._directory_named(b"outer")
        inner = self._directory_named(b"inner", parent=outer.node)
        file = self._file(b"file", b"data", parent=inner.node)

        self.provider.rename(outer.node, b"inner", self.root, b"moved", 0)
        self.provider.rename(self.root, b"outer", inner.node, b"outer", 0)

        assert self.provider.read(file.node, 0, 10) == b"data"
        assert self._names(inner.node) == [b"file", b"outer"]
        self._file(b"later", parent=outer.node)
        found = self.provider.lookup(self.provider.lookup(self.root, b"moved").node, b"outer").node
        assert self._names(found) == [b"later"]

    def test_a_rename_refuses_what_rename_does(self) -> None:
        if not self.renames:
            return
        self._file(b"file")
        full, empty = self._directory_named(b"full"), self._directory_named(b"empty")
        self._file(b"inner", parent=full.node)

        for name, new_parent, new_name, number in (
            (b"missing", self.root, b"x", errno.ENOENT),
            (b"file", self.root, b"empty", errno.EISDIR),
            (b"empty", self.root, b"file", errno.ENOTDIR),
            (b"empty", self.root, b"full", errno.ENOTEMPTY),
            (b"empty", empty.node, b"itself", errno.EINVAL),
        ):
            with refused(number):
                self.provider.rename(self.root, name, new_parent, new_name, 0)
        with refused(errno.EINVAL, errno.EPERM):
            self.provider.rename(self.root, b"file", self.root, b"x", 1 << 20)
        self.provider.rename(self.root, b"file", self.root, b"file", 0)
        assert self._names() == [b"empty", b"file", b"full"]

    def test_a_rename_heeds_its_flags_or_refuses_them(self) -> None:
        if not self.renames:
            return
        first, second = self._file(b"a", b"first"), self._file(b"b", b"second")

        with refused(errno.EEXIST, errno.EINVAL):
            self.provider.rename(self.root, b"a", self.root, b"b", RENAME_NOREPLACE)
        try:
            self.provider.rename(self.root, b"a", self.root, b"b", RENAME_EXCHANGE)
        except OSError as error:
            assert error.errno == errno.EINVAL  # noqa: PT017 - no pytest here
        else:
            first, second = second, first
        assert self.provider.lookup(self.root, b"a").node == first.node
        assert self.provider.lookup(self.root, b"b").node == second.node

    # Nodes.

    def test_an_unlinked_file_lives_until_it_is_forgotten(self) -> None:
        if not self.orphans:
            return
        file = self._file(b"file", b"data")
        self.provider.unlink(self.root, b"file")

        self.provider.write(file.node, 4, memoryview(b" more"), append=False)
        assert self.provider.read(file.node, 0, 20) == b"data more"
        assert self.provider.getattr(file.node)[0].st_nlink == 0
        self.provider.forget(file.node, 1)
        with refused(errno.ESTALE):
            self.provider.getattr(file.node)

    def test_a_node_is_never_used_twice(self) -> None:
        first = self._file(b"file")
        self.provider.unlink(self.root, b"file")
        self.provider.forget(first.node, 1)

        assert self._file(b"file").node != first.node

    def test_a_node_that_was_never_given_is_stale(self) -> None:
        provider = self.provider
        attempts: tuple[Callable[[Node], object], ...] = (
            provider.getattr,
            lambda node: provider.lookup(node, b"file"),
            lambda node: provider.readdir(node, 0, 4096),
            lambda node: provider.read(node, 0, 1),
            lambda node: provider.write(node, 0, memoryview(b"x"), append=False),
            lambda node: provider.create(node, b"file", 0o644, 0),
            lambda node: provider.mkdir(node, b"file", 0o755),
            lambda node: provider.unlink(node, b"file"),
        )
        for attempt in attempts:
            with refused(errno.ESTALE):
                attempt(_UNKNOWN_NODE)

    def test_forgetting_too_much_hurts_nobody(self) -> None:
        file = self._file(b"file", b"data")

        for node in (file.node, ROOT, _UNKNOWN_NODE):
            self.provider.forget(node, 2**64 - 1)

        found = self.provider.lookup(self.root, b"file")
        assert self.provider.read(found.node, 0, 10) == b"data"

    # Listings.

    def test_a_listing_tells_kinds_and_begins_with_the_directory_itself(self) -> None:
        self._file(b"file")
        self._directory_named(b"directory")

        listed = {entry.name: entry.kind << 12 for entry in self._listed()}

        assert {b".", b".."} <= set(listed)
        assert (listed[b"file"] or stat.S_IFREG) == stat.S_IFREG
        assert (listed[b"directory"] or stat.S_IFDIR) == stat.S_IFDIR
        with refused(errno.ENOTDIR, errno.ESTALE):
            self.provider.readdir(self.provider.lookup(self.root, b"file").node, 0, 4096)

    def test_a_listing_in_pieces_has_every_name_once(self) -> None:
        names = [b"name%03d" % number for number in range(300)]
        for name in names:
            self._file(name)

        for size in (_LEAST_READDIR, 4096):
            listed = [entry.name for entry in self._listed(size=size)]
            assert sorted(listed) == sorted([b".", b"..", *names])

    def test_a_listing_that_is_resumed_misses_nothing_while_names_come_and_go(self) -> None:
        names = {b"name%02d" % number for number in range(60)}
        for name in names:
            self._file(name)

        listed, offset, removed = list[bytes](), 0, set[bytes]()
        while entries := self.provider.readdir(self.root, offset, _LEAST_READDIR):
            # Only the first is taken, as by a caller with little room; the rest is asked for again.
            listed.append(entries[0].name)
            offset = entries[0].offset
            assert len(listed) < _MOST_NAMES, "the listing does not end"
            if entries[0].name in names and len(removed) < 20:
                self.provider.unlink(self.root, entries[0].name)
                removed.add(entries[0].name)
                self._file(b"new%d" % len(removed))

        assert len(listed) == len(set(listed))
        assert names <= set(listed)

    # Contents.

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

    def test_space_is_reserved_freed_sought_and_copied_as_asked_or_refused(self) -> None:
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
                assert error.errno in _NOTHING  # noqa: PT017 - no pytest here
        assert self.provider.read(other, 0, 10) in (b"ata", b"")

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

    # Against a model.

    def test_any_sequence_of_changes_follows_a_model(self) -> None:
        """Names and contents in one directory, against a dictionary."""
        chance, model = random.Random(7), dict[bytes, bytes]()
        for step in range(300):
            name, other = (b"n%d" % chance.randrange(5) for _ in "ab")
            action = chance.choice(("write", "unlink", "rename"))
            if action == "write":
                made = self.provider.create(self.root, name, 0o600, os.O_TRUNC)
                model[name] = b"%d" % step
                self.provider.write(made.node, 0, memoryview(model[name]), append=False)
                self.provider.forget(made.node, 1)
            elif name not in model:
                continue
            elif action == "unlink":
                self.provider.unlink(self.root, name)
                del model[name]
            elif self.renames:
                self.provider.rename(self.root, name, self.root, other, 0)
                model[other] = model.pop(name)
        found = {name: self.provider.lookup(self.root, name) for name in self._names()}
        assert {name: self.provider.read(e.node, 0, 9) for name, e in found.items()} == model

    # What the tests above are made of.

    def _file(self, name: bytes, data: bytes = b"", parent: Node | None = None) -> Entry:
        made = self.provider.create(parent or self.root, name, 0o644, os.O_EXCL)
        if data:
            assert self.provider.write(made.node, 0, memoryview(data), append=False) == len(data)
        return made

    def _directory_named(self, name: bytes, parent: Node | None = None) -> Entry:
        return self.provider.mkdir(parent or self.root, name, 0o755)

    def _listed(self, node: Node | None = None, size: int = 1 << 16) -> list[DirEntry]:
        listed: list[DirEntry] = []
        while entries := self.provider.readdir(
            node or self.root, listed[-1].offset if listed else 0, size
        ):
            listed += entries
            assert len(listed) < _MOST_NAMES, "the listing does not end"
        return listed

    def _names(self, node: Node | None = None) -> list[bytes]:
        return sorted({entry.name for entry in self._listed(node)} - {b".", b".."})

    def _set(self, node: Node, valid: SetAttrField, **values: int) -> int:
        fields = dict.fromkeys(("size", "atime_ns", "mtime_ns", "mode", "uid", "gid"), 0)
        attr, _lifetime = self.provider.setattr(node, SetAttr(valid, **{**fields, **values}))
        return attr.st_size
