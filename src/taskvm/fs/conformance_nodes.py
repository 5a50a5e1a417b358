"""The part of the conformance tests (fs/conformance.py) about nodes: how long they live, and in which mount."""

from __future__ import annotations

import errno
from collections.abc import Callable

from taskvm.fs.conformance_harness import NOTHING, UNKNOWN_NODE, Harness, refused
from taskvm.fs.provider import ROOT, Change, Node


class NodeTests(Harness):
    """A node is what it was until it is forgotten."""

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
                attempt(UNKNOWN_NODE)

    def test_forgetting_too_much_hurts_nobody(self) -> None:
        file = self._file(b"file", b"data")

        for node in (file.node, ROOT, UNKNOWN_NODE):
            self.provider.forget(node, 2**64 - 1)

        found = self.provider.lookup(self.root, b"file")
        assert self.provider.read(found.node, 0, 10) == b"data"

    # Mounts.

    def test_two_mounts_have_nothing_to_do_with_each_other(self) -> None:
        """Each has nodes, references and a listener of its own; what both serve may be the same."""
        if not self.shared:
            return
        file, other = self._file(b"file", b"data").node, self.value.opened()
        try:
            assert other is not self.provider, (
                "opened() has returned the same again: shared = False"
            )
            self.provider.changes, other.changes = (list[Change]().append for _ in "ab")
            assert self.provider.changes is not other.changes
            with refused(errno.ESTALE):
                other.getattr(file)
            other.forget(file, 2**64 - 1)
            other.forget(ROOT, 1)
        finally:
            other.close()

        assert self.provider.read(file, 0, 10) == b"data"
        assert self._names() == [b"file"]

    def test_a_saved_guest_goes_on_with_its_nodes(self) -> None:
        """Export, and import into what was opened freshly; or neither."""
        directory = self._directory_named(b"directory").node
        file, gone = self._file(b"file", b"data", parent=directory), self._file(b"gone")
        self.provider.unlink(self.root, b"gone")
        self.provider.forget(gone.node, 1)
        try:
            state = self.provider.export_state()
        except OSError as error:
            assert error.errno in NOTHING  # noqa: PT017 - no pytest here
            return
        if not self.shared:
            return
        self.provider, before = self.value.opened(), self.provider
        self.provider.import_state(state)
        before.close()

        assert self._names() == [b"directory"]
        found = self.provider.lookup(self.provider.lookup(self.root, b"directory").node, b"file")
        assert (found.node, found.attr.st_size) == (file.node, 4)
        assert self.provider.read(file.node, 0, 10) == b"data"
        self.provider.write(file.node, 4, memoryview(b" more"), append=False)
        assert self.provider.read(file.node, 0, 10) == b"data more"
        with refused(errno.ESTALE):
            self.provider.getattr(gone.node)
        assert self._file(b"new").node not in {ROOT, self.root, directory, file.node}
        self.provider.forget(file.node, 2)

    def test_what_is_no_saved_state_is_said(self) -> None:
        if not self.shared:
            return
        for state in (b"", b"\xc1", b"no state", bytes(100)):
            fresh = self.value.opened()
            try:
                fresh.import_state(state)
            except ValueError:
                pass
            except OSError as error:
                assert error.errno in NOTHING  # noqa: PT017 - no pytest here
            else:
                raise AssertionError(f"{state!r} was taken for a saved state")
            finally:
                fresh.close()
