"""What the conformance tests (fs/conformance.py) are made of: a provider for each, and a few words to use it by."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taskvm.fs.provider import ROOT, DirEntry, Entry, Node, Provider
from taskvm.wire.fuse import SetAttr, SetAttrField

UNKNOWN_NODE = 2**40
LEAST_READDIR = 1024  # nobody asks for less
MOST_NAMES = 10_000  # more than any test makes
NOTHING = (errno.ENOSYS, errno.EOPNOTSUPP)


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


class Harness:
    """Makes a provider for each test. What it does not have is said by the class that is tested."""

    links = True
    symlinks = True
    renames = True
    orphans = True
    """Whether a removed file lives on for who has it open."""
    modes = True
    """Whether permissions and times can be set and are kept."""
    shared = True
    """Whether one value can serve several mounts at once, each with nodes of its own."""

    value: Provider
    provider: Provider

    def make(self, directory: Path) -> Provider:
        """Return a new, empty, writable provider."""
        raise NotImplementedError("override make()")

    def find_root(self) -> Node:
        """Return the directory of `provider` that the tests work in."""
        return ROOT

    def setup_method(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="taskvm-conformance-"))
        self.value = self.make(self._directory)
        self.provider = self.value.opened()
        self.root = self.find_root()

    def teardown_method(self) -> None:
        self.provider.close()
        self.provider.close()  # idempotent
        shutil.rmtree(self._directory)

    # Words.

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
            assert len(listed) < MOST_NAMES, "the listing does not end"
        return listed

    def _names(self, node: Node | None = None) -> list[bytes]:
        return sorted({entry.name for entry in self._listed(node)} - {b".", b".."})

    def _set(self, node: Node, valid: SetAttrField, **values: int) -> int:
        fields = dict.fromkeys(("size", "atime_ns", "mtime_ns", "mode", "uid", "gid"), 0)
        attr, _lifetime = self.provider.setattr(node, SetAttr(valid, **{**fields, **values}))
        return attr.st_size
