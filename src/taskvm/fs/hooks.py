"""A provider whose operations can be watched, changed and refused by functions of yours.

`before` gets each operation first. It refuses by raising an OSError (PermissionError(errno.EACCES, "…")), and may
return the operation with other `data` (as long as before, for a write), `mode`, `flags` or `changes` where it has them;
nothing else of it can be changed. `after` gets what was done and, for what returns bytes, the bytes: it may return
others in their place, or refuse to hand them out.

Both run on a thread of the mount's own and hold up this mount only. An exception that is no OSError is a bug: the
guest gets EIO. What the guest's kernel has in its caches is not asked for again, so nothing is called for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from taskvm.fs.places import Path, Place
from taskvm.fs.provider import DirEntry, Entry, Node, Provider
from taskvm.fs.tracked import Tracked
from taskvm.wire.fuse import SetAttr
from taskvm.wire.fuse_replies import Attr, Lifetime, StatFs

T = TypeVar("T")


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest asks for: the provider's method `name`, on `path` from the root of the mount ("/" is the root).

    `other` is the path it is moved, linked or copied to. `data` is what is written, the target of a new symbolic
    link, or the value of an attribute called `attribute`.
    """

    name: str
    path: str
    other: str | None = None
    data: bytes | None = None
    mode: int | None = None
    flags: int | None = None
    offset: int | None = None
    size: int | None = None
    attribute: str | None = None
    changes: SetAttr | None = None


_CHANGEABLE = frozenset({"data", "mode", "flags", "changes"})

Before = Callable[[Operation], Operation | None]
After = Callable[[Operation, bytes | None], bytes | None]


def _nothing_before(_operation: Operation) -> None:
    """Let it happen."""


def _nothing_after(_operation: Operation, _result: bytes | None) -> None:
    """Leave it as it is."""


class Hooks(Tracked):
    """Serves `inner`, and asks `before` and tells `after` of each operation; see the page on files for an example."""

    def __init__(
        self, inner: Provider, *, before: Before = _nothing_before, after: After = _nothing_after
    ) -> None:
        self._before = before
        self._after = after
        super().__init__(inner)

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        do = super().lookup
        asked = Operation(name="lookup", path=self._below(parent, name))
        return self._run(asked, lambda _: do(parent, name))

    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        do = super().readdir
        asked = Operation(name="readdir", path=self._path(node), offset=offset, size=size)
        return self._run(asked, lambda _: do(node, offset, size))

    def readlink(self, node: Node) -> bytes:
        do = super().readlink
        return self._hand_out(Operation(name="readlink", path=self._path(node)), lambda _: do(node))

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        do = super().create
        path = self._below(parent, name)
        asked = Operation(name="create", path=path, mode=mode, flags=flags)
        return self._run(asked, lambda o: do(parent, name, _given(o.mode), _given(o.flags)))

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        do = super().mknod
        asked = Operation(name="mknod", path=self._below(parent, name), mode=mode)
        return self._run(asked, lambda o: do(parent, name, _given(o.mode)))

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        do = super().mkdir
        asked = Operation(name="mkdir", path=self._below(parent, name), mode=mode)
        return self._run(asked, lambda o: do(parent, name, _given(o.mode)))

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        do = super().symlink
        asked = Operation(name="symlink", path=self._below(parent, name), data=target)
        return self._run(asked, lambda o: do(parent, name, _given(o.data)))

    def link(self, node: Node, parent: Node, name: bytes) -> Entry:
        do = super().link
        asked = Operation(name="link", path=self._path(node), other=self._below(parent, name))
        return self._run(asked, lambda _: do(node, parent, name))

    def unlink(self, parent: Node, name: bytes) -> None:
        do = super().unlink
        asked = Operation(name="unlink", path=self._below(parent, name))
        self._run(asked, lambda _: do(parent, name))

    def rmdir(self, parent: Node, name: bytes) -> None:
        do = super().rmdir
        asked = Operation(name="rmdir", path=self._below(parent, name))
        self._run(asked, lambda _: do(parent, name))

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        do = super().rename
        path, other = self._below(parent, name), self._below(new_parent, new_name)
        asked = Operation(name="rename", path=path, other=other, flags=flags)
        self._run(asked, lambda o: do(parent, name, new_parent, new_name, _given(o.flags)))

    # Attributes.

    def getattr(self, node: Node) -> tuple[Attr, Lifetime]:
        do = super().getattr
        return self._run(Operation(name="getattr", path=self._path(node)), lambda _: do(node))

    def setattr(self, node: Node, changes: SetAttr) -> tuple[Attr, Lifetime]:
        do = super().setattr
        asked = Operation(name="setattr", path=self._path(node), changes=changes)
        return self._run(asked, lambda o: do(node, _given(o.changes)))

    def statfs(self, node: Node) -> StatFs:
        do = super().statfs
        return self._run(Operation(name="statfs", path=self._path(node)), lambda _: do(node))

    def getxattr(self, node: Node, name: bytes) -> bytes:
        do = super().getxattr
        asked = Operation(name="getxattr", path=self._path(node), attribute=_text(name))
        return self._hand_out(asked, lambda _: do(node, name))

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        do = super().setxattr
        path = self._path(node)
        asked = Operation(
            name="setxattr", path=path, attribute=_text(name), data=value, flags=flags
        )
        self._run(asked, lambda o: do(node, name, _given(o.data), _given(o.flags)))

    def listxattr(self, node: Node) -> list[bytes]:
        do = super().listxattr
        return self._run(Operation(name="listxattr", path=self._path(node)), lambda _: do(node))

    def removexattr(self, node: Node, name: bytes) -> None:
        do = super().removexattr
        asked = Operation(name="removexattr", path=self._path(node), attribute=_text(name))
        self._run(asked, lambda _: do(node, name))

    # Contents.

    def read(self, node: Node, offset: int, size: int) -> bytes:
        do = super().read
        asked = Operation(name="read", path=self._path(node), offset=offset, size=size)
        return self._hand_out(asked, lambda _: do(node, offset, size), most=size)

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        do = super().write
        path = self._path(node)
        asked = Operation(
            name="write", path=path, offset=None if append else offset, data=bytes(data)
        )

        def write(operation: Operation) -> int:
            given = _given(operation.data)
            if len(given) != len(data):
                raise ValueError("a hook has changed the length of what is written")
            return do(node, offset, memoryview(given), append=append)

        return self._run(asked, write)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        do = super().fsync
        asked = Operation(name="fsync", path=self._path(node))
        self._run(asked, lambda _: do(node, data_only=data_only))

    def sync_later(self, node: Node, *, data_only: bool) -> Callable[[], None] | None:
        self.place(node)
        return None  # `fsync` does it, which the hooks see

    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        do = super().allocate
        path = self._path(node)
        asked = Operation(name="allocate", path=path, offset=offset, size=length, flags=mode)
        self._run(asked, lambda o: do(node, offset, length, _given(o.flags)))

    def seek(self, node: Node, offset: int, whence: int) -> int:
        do = super().seek
        asked = Operation(name="seek", path=self._path(node), offset=offset, flags=whence)
        return self._run(asked, lambda o: do(node, offset, _given(o.flags)))

    def copy_range(
        self, node: Node, offset: int, target: Node, target_offset: int, length: int
    ) -> int:
        do = super().copy_range
        path, other = self._path(node), self._path(target)
        asked = Operation(name="copy_range", path=path, other=other, offset=offset, size=length)
        return self._run(asked, lambda _: do(node, offset, target, target_offset, length))

    # Calling the hooks...

    def _ask(self, asked: Operation) -> Operation:
        """Return what shall be done. What a hook has changed without effect is a mistake, and not ignored."""
        operation = self._before(asked) or asked
        if operation is asked:
            return asked
        for field in asked.__struct_fields__:
            old, new = getattr(asked, field), getattr(operation, field)
            if old != new and (field not in _CHANGEABLE or old is None or new is None):
                raise ValueError(
                    f"a hook has changed the {field} of {asked.name}, which has none that a hook may change"
                )
        return operation

    def _run(self, asked: Operation, call: Callable[[Operation], T]) -> T:
        operation = self._ask(asked)
        result = call(operation)
        if self._after(operation, None) is not None:
            raise ValueError(f"a hook has returned bytes for {asked.name}, which has none")
        return result

    def _hand_out(
        self, asked: Operation, call: Callable[[Operation], bytes], most: int | None = None
    ) -> bytes:
        operation = self._ask(asked)
        result = call(operation)
        changed = self._after(operation, result)
        if changed is None:
            return result
        if most is not None and len(changed) > most:
            raise ValueError("a hook has returned more than was asked for")
        return changed

    def _path(self, node: Node) -> str:
        return _rendered(self.place(node).path)

    def _below(self, parent: Node, name: bytes) -> str:
        place: Place = self.place(parent)
        return _rendered((*place.path, name))


def _rendered(path: Path) -> str:
    return "/" + _text(b"/".join(path))


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def _given(value: T | None) -> T:
    assert value is not None  # `_ask` has seen to it
    return value
