"""A provider in front of another one. It forwards every call; a subclass overrides those it has something to say about.

Rule 1: nodes are those of the inner provider, unless a subclass translates them in both directions.
Rule 2: what belongs to one mount is made in `begin`, never in `__init__`: one value may be mounted several times.
Rule 3: an operation that is added to the contract is added here (a test compares the two), and whoever restricts
    anything says what becomes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from taskvm.errors import UsageError
from taskvm.fs.provider import Change, DirEntry, Entry, Node, Provider, Source
from taskvm.wire.fuse import SetAttr
from taskvm.wire.fuse_replies import Attr, Lifetime, StatFs


def check_provider(operation: str, inner: object) -> None:
    """Raise UsageError for what is no provider, as a path: it would be noticed when a guest waits for it."""
    if not isinstance(inner, Provider):
        raise UsageError(operation, "it is no provider", f"Write HostDir({inner!r})")


class Wrapper(Provider):
    """Serves what `inner` serves: the base class of what changes one aspect of another provider."""

    def __init__(self, inner: Provider) -> None:
        check_provider(f"serve {inner!r} by {type(self).__name__}", inner)
        self.inner = inner
        self.begin()

    def begin(self) -> None:
        """Make what belongs to one mount. A subclass that overrides it calls it first."""

    def opened(self) -> Provider:
        served = copy.copy(self)
        served.inner = self.inner.opened()
        served.begin()
        return served

    def close(self) -> None:
        self.inner.close()

    def sources(self) -> Sequence[Source]:
        return self.inner.sources()

    def rest(self) -> None:
        self.inner.rest()

    def export_state(self) -> bytes:
        return self.inner.export_state()

    def import_state(self, state: bytes) -> None:
        self.inner.import_state(state)

    # What is set and asked by attribute is the inner provider's own.

    @property
    def readonly(self) -> bool:  # type: ignore[override]  # who wraps a provider asks it, and never sets it
        return self.inner.readonly

    @property
    def is_file(self) -> bool:  # type: ignore[override]  # as above
        return self.inner.is_file

    @property
    def lasting(self) -> bool:  # type: ignore[override]  # as above
        return self.inner.lasting

    @property
    def xattrs(self) -> bool:  # type: ignore[override]  # as above
        return self.inner.xattrs

    @property
    def prompt(self) -> bool:  # type: ignore[override]  # as above
        # Not the inner provider's: a wrapper of the user's may take its time. Those of ours that do not, say so.
        return False

    @property
    def request_deadline_s(self) -> float:  # type: ignore[override]  # as above
        return self.inner.request_deadline_s

    @property
    def changes(self) -> Callable[[Change], None]:
        return self.inner.changes

    @changes.setter
    def changes(self, listener: Callable[[Change], None]) -> None:
        self.inner.changes = listener

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        return self.inner.lookup(parent, name)

    def forget(self, node: Node, count: int) -> None:
        self.inner.forget(node, count)

    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        return self.inner.readdir(node, offset, size)

    def readlink(self, node: Node) -> bytes:
        return self.inner.readlink(node)

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        return self.inner.create(parent, name, mode, flags)

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        return self.inner.mknod(parent, name, mode)

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        return self.inner.mkdir(parent, name, mode)

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        return self.inner.symlink(parent, name, target)

    def link(self, node: Node, parent: Node, name: bytes) -> Entry:
        return self.inner.link(node, parent, name)

    def unlink(self, parent: Node, name: bytes) -> None:
        self.inner.unlink(parent, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        self.inner.rmdir(parent, name)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        self.inner.rename(parent, name, new_parent, new_name, flags)

    # Attributes.

    def getattr(self, node: Node) -> tuple[Attr, Lifetime]:
        return self.inner.getattr(node)

    def setattr(self, node: Node, changes: SetAttr) -> tuple[Attr, Lifetime]:
        return self.inner.setattr(node, changes)

    def statfs(self, node: Node) -> StatFs:
        return self.inner.statfs(node)

    def getxattr(self, node: Node, name: bytes) -> bytes:
        return self.inner.getxattr(node, name)

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        self.inner.setxattr(node, name, value, flags)

    def listxattr(self, node: Node) -> list[bytes]:
        return self.inner.listxattr(node)

    def removexattr(self, node: Node, name: bytes) -> None:
        self.inner.removexattr(node, name)

    # Contents.

    def read(self, node: Node, offset: int, size: int) -> bytes:
        return self.inner.read(node, offset, size)

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        return self.inner.write(node, offset, data, append=append)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        self.inner.fsync(node, data_only=data_only)

    def sync_later(self, node: Node, *, data_only: bool) -> Callable[[], None] | None:
        return None  # a subclass that overrides `fsync` is asked

    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        self.inner.allocate(node, offset, length, mode)

    def seek(self, node: Node, offset: int, whence: int) -> int:
        return self.inner.seek(node, offset, whence)

    def copy_range(
        self, node: Node, offset: int, target: Node, target_offset: int, length: int
    ) -> int:
        return self.inner.copy_range(node, offset, target, target_offset, length)
