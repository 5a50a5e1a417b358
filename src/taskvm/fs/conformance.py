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
import stat

from taskvm.fs.conformance_contents import ContentTests
from taskvm.fs.conformance_harness import LEAST_READDIR, MOST_NAMES, NOTHING, refused
from taskvm.fs.conformance_nodes import NodeTests
from taskvm.fs.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE


class ProviderConformance(NodeTests, ContentTests):
    """The contract of taskvm.Provider (fs/provider.py) as a class of tests. Subclass it and override `make`."""

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

    def test_fifos_and_sockets_are_names_without_contents_or_refused(self) -> None:
        for kind in (stat.S_IFIFO, stat.S_IFSOCK):
            try:
                made = self.provider.mknod(self.root, b"special", kind | 0o600)
            except OSError as error:
                assert error.errno in (errno.EPERM, *NOTHING)  # noqa: PT017 - no pytest here
                continue
            assert stat.S_IFMT(made.attr.st_mode) == kind
            assert made.attr.st_nlink == 1
            assert self.provider.lookup(self.root, b"special").node == made.node
            listed = {entry.name: entry.kind << 12 for entry in self._listed()}
            assert listed[b"special"] in (kind, 0)
            with refused(errno.EEXIST):
                self.provider.mknod(self.root, b"special", kind | 0o600)
            with refused(errno.EINVAL, errno.ENXIO, errno.EOPNOTSUPP):
                self.provider.read(made.node, 0, 10)
            if self.renames:
                self.provider.rename(self.root, b"special", self.root, b"moved", 0)
                self.provider.rename(self.root, b"moved", self.root, b"special", 0)
            self.provider.unlink(self.root, b"special")
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

        for size in (LEAST_READDIR, 4096):
            listed = [entry.name for entry in self._listed(size=size)]
            assert sorted(listed) == sorted([b".", b"..", *names])

    def test_a_listing_that_is_resumed_misses_nothing_while_names_come_and_go(self) -> None:
        names = {b"name%02d" % number for number in range(60)}
        for name in names:
            self._file(name)

        listed, offset, removed = list[bytes](), 0, set[bytes]()
        while entries := self.provider.readdir(self.root, offset, LEAST_READDIR):
            # Only the first is taken, as by a caller with little room; the rest is asked for again.
            listed.append(entries[0].name)
            offset = entries[0].offset
            assert len(listed) < MOST_NAMES, "the listing does not end"
            if entries[0].name in names and len(removed) < 20:
                self.provider.unlink(self.root, entries[0].name)
                removed.add(entries[0].name)
                self._file(b"new%d" % len(removed))

        assert len(listed) == len(set(listed))
        assert names <= set(listed)

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
