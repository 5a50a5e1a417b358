"""Several providers in one tree, each below a path of its own.

Rule 1: a node of the guest's is (which provider, its node) in one number; 0 stands for the junctions, the directories
    that have a route below them. Inode numbers are told apart in the same way.
Rule 2: a junction shows its routes above what the provider that covers its path has there, looked up anew each time.
    Where that has no directory, the junction is an empty one that takes nothing (EROFS).
Rule 3: a route is like a mount point: it cannot be moved, removed or replaced (EBUSY), and nothing moves from one
    provider to another (EXDEV).
"""

from __future__ import annotations

import copy
import errno
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Self

import msgspec

from taskvm.errors import UsageError
from taskvm.fs.attributes import BLOCK, Attributes
from taskvm.fs.divided import Divided, Target, refuse_crossing
from taskvm.fs.provider import ROOT, Change, DirEntry, Entry, Node, Provider, Source, refuse
from taskvm.fs.wrapper import Wrapper, check_provider
from taskvm.wire.fuse import SetAttr
from taskvm.wire.fuse_replies import Attr, Lifetime, StatFs

# Offsets of a junction's routes in its listing: behind those of hosts' file systems and of fs/specials.py.
_FIRST_OFFSET = 0x7FFF_FFFF_8000_0000
_END_OFFSET = 0x7FFF_FFFF_FFFF_FFFF  # where ext4 says that a directory ends
_LIFETIME = Lifetime(entry_ns=0, attr_ns=0)  # what is below a junction may come and go
# In inode numbers that are not of the provider at "/": no file system of a host has this bit, and those that
# fs/specials.py and private layers make have one of the two above it.
_ELSEWHERE = 1 << 60


class Junction:
    """A directory on the way to a route, or a route. `index` is its provider's number, 0 without one."""

    def __init__(self, number: int, name: bytes, parent: Junction | None) -> None:
        self.number = number
        self.name = name
        self.parent = parent
        self.index = 0
        self.routes: dict[bytes, Junction] = {}


class Router(Divided):
    """Serves each provider of `routes` at its path: `{"/": HostDir("."), "/cache": Memory()}`.

    Without a route at "/" the root holds the routes and nothing else.
    """

    def __init__(self, routes: Mapping[str, Provider]) -> None:
        self._junctions = [Junction(1, b"", None)]
        self._providers: list[Provider] = []
        for path, provider in sorted(routes.items()):
            self._add(path, provider)
        for junction in self._junctions:
            self._check(junction)
        self._base = len(self._providers) + 1
        self._keeps_numbers = self._junctions[0].index
        self._begin()

    def _add(self, path: str, provider: Provider) -> None:
        operation = f"route {path!r}"
        check_provider(operation, provider)
        pure = PurePosixPath(path)
        if not pure.is_absolute() or ".." in pure.parts or str(pure) != path or "\0" in path:
            raise UsageError(operation, "it is not a plain absolute path", "Write it like /cache")
        if isinstance(_innermost(provider), Router):
            raise UsageError(operation, "it is a Router itself", "Write all paths into one of them")
        junction = self._junctions[0]
        for part in pure.parts[1:]:
            name = part.encode(errors="surrogateescape")
            if name not in junction.routes:
                made = Junction(len(self._junctions) + 1, name, junction)
                junction.routes[name] = made
                self._junctions.append(made)
            junction = junction.routes[name]
        self._providers.append(provider)
        junction.index = len(self._providers)

    def _check(self, junction: Junction) -> None:
        if not junction.index or not self._providers[junction.index - 1].is_file:
            return
        if junction.parent is None or junction.routes:
            raise UsageError(
                f"route a file at {os.fsdecode(junction.name) or '/'!r}",
                "it has to be a directory",
                "Give the file a path of its own",
            )

    def _begin(self) -> None:
        self._made_ns = time.time_ns()
        self._held: dict[int, Node] = {}  # junction's number -> what it covers, with one reference
        # What a junction stands for: used by itself it would show what a route hides.
        self._covered: set[tuple[int, Node]] = {
            (junction.index, ROOT)
            for junction in self._junctions
            if junction.index and junction.routes
        }
        self._listener: Callable[[Change], None] | None = None

    def opened(self) -> Self:
        served = copy.copy(self)
        served._providers = []
        try:
            for provider in self._providers:
                served._providers.append(provider.opened())
        except BaseException:
            served.close()
            raise
        served._begin()
        return served

    def close(self) -> None:
        for provider in self._providers:
            provider.close()

    def sources(self) -> Sequence[Source]:
        return [source for provider in self._providers for source in provider.sources()]

    def rest(self) -> None:
        for provider in self._providers:
            provider.rest()

    def export_state(self) -> bytes:
        states = [provider.export_state() for provider in self._providers]
        return msgspec.msgpack.encode((states, self._held))

    def import_state(self, state: bytes) -> None:
        states, self._held = msgspec.msgpack.decode(state, type=tuple[list[bytes], dict[int, int]])
        for number, node in self._held.items():
            self._covered.add((self._provider_above(self._junctions[number - 1]), node))
        for provider, each in zip(self._providers, states, strict=True):
            provider.import_state(each)

    @property
    def providers(self) -> tuple[Provider, ...]:
        """Those that are routed to, in the order of their paths."""
        return tuple(self._providers)

    @property
    def readonly(self) -> bool:  # type: ignore[override]  # asked, never set
        return all(provider.readonly for provider in self._providers)

    @property
    def lasting(self) -> bool:  # type: ignore[override]  # as above
        return all(provider.lasting for provider in self._providers)

    @property
    def prompt(self) -> bool:  # type: ignore[override]  # as above
        return all(provider.prompt for provider in self._providers)

    @property
    def request_deadline_s(self) -> float:  # type: ignore[override]  # as above
        return max(provider.request_deadline_s for provider in self._providers)

    @property
    def xattrs(self) -> bool:  # type: ignore[override]  # as above
        return any(provider.xattrs for provider in self._providers)

    @property
    def changes(self) -> Callable[[Change], None]:
        return self._listener or Provider.changes

    @changes.setter
    def changes(self, listener: Callable[[Change], None]) -> None:
        self._listener = listener
        for index, provider in enumerate(self._providers, start=1):

            def tell(change: Change, index: int = index) -> None:
                listener(Change(self._known_as(index, change.node), change.name))

            provider.changes = tell

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        junction = self._junction(parent)
        if junction is not None and name in junction.routes:
            return self._entered(junction.routes[name])
        try:
            target = self._target(parent)
        except OSError as error:
            raise refuse(errno.ENOENT if error.errno == errno.EROFS else errno.ESTALE) from None
        return self._entry(target.number, target.provider.lookup(target.node, name))

    def forget(self, node: Node, count: int) -> None:
        index, inner = self._split(node)
        if 0 < index <= len(self._providers):
            self._providers[index - 1].forget(inner, count)

    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        junction = self._junction(node)
        if junction is None:
            return self._listed(self._target(node), offset, size)
        under = self._under(junction)
        while under is not None and not _FIRST_OFFSET <= offset < _END_OFFSET:
            entries = self._listed(under, offset, size)
            if not entries:
                offset = _FIRST_OFFSET
                break
            shown = [entry for entry in entries if entry.name not in junction.routes]
            if shown:
                return shown
            offset = entries[-1].offset
        return self._routes_of(junction, offset, dots=under is None)

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        target = self._free(parent, name)
        return self._entry(target.number, target.provider.create(target.node, name, mode, flags))

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        target = self._free(parent, name)
        return self._entry(target.number, target.provider.mknod(target.node, name, mode))

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        target = self._free(parent, name)
        return self._entry(target.number, target.provider.mkdir(target.node, name, mode))

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        where = self._free(parent, name)
        return self._entry(where.number, where.provider.symlink(where.node, name, target))

    def link(self, node: Node, parent: Node, name: bytes) -> Entry:
        source, target = self._target(node), self._free(parent, name)
        refuse_crossing(source, target)
        return self._entry(target.number, target.provider.link(source.node, target.node, name))

    def unlink(self, parent: Node, name: bytes) -> None:
        target = self._movable(parent, name)
        target.provider.unlink(target.node, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        target = self._movable(parent, name)
        target.provider.rmdir(target.node, name)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        source, target = self._movable(parent, name), self._movable(new_parent, new_name)
        refuse_crossing(source, target)
        source.provider.rename(source.node, name, target.node, new_name, flags)

    # Attributes.

    def getattr(self, node: Node) -> tuple[Attr, Lifetime]:
        junction = self._junction(node)
        if junction is not None:
            return self._attributes_of(junction)
        target = self._target(node)
        attr, lifetime = target.provider.getattr(target.node)
        return self._told(target.number, attr), lifetime

    def setattr(self, node: Node, changes: SetAttr) -> tuple[Attr, Lifetime]:
        target = self._target(node)
        attr, lifetime = target.provider.setattr(target.node, changes)
        return self._told(target.number, attr), lifetime

    def statfs(self, node: Node) -> StatFs:
        junction = self._junction(node)
        if junction is not None and self._under(junction) is None:
            return StatFs(
                blocks=0, free=0, available=0, files=len(self._junctions), files_free=0,
                block_size=BLOCK, fragment_size=BLOCK, max_name=255,
            )  # fmt: skip
        return super().statfs(node)

    # Nodes, of ours and of the providers...

    def _split(self, node: Node) -> tuple[int, Node]:
        inner, index = divmod(node - 1, self._base)
        return index, inner + 1

    def _joined(self, index: int, node: Node) -> Node:
        return (node - 1) * self._base + index + 1

    def _known_as(self, index: int, node: Node) -> Node:
        """Return the guest's number of a node: a junction's, where one covers it, as the root always does."""
        for junction in self._junctions:
            shown = junction.routes or junction.parent is None
            if shown and self._covers(junction) == (index, node):
                return self._joined(0, junction.number)
        return self._joined(index, node)

    def _covers(self, junction: Junction) -> tuple[int, Node] | None:
        if junction.index:
            return junction.index, ROOT
        node = self._held.get(junction.number)
        return None if node is None else (self._provider_above(junction), node)

    def _junction(self, node: Node) -> Junction | None:
        index, number = self._split(node)
        if index:
            return None
        if not 0 < number <= len(self._junctions):
            raise refuse(errno.ESTALE)
        return self._junctions[number - 1]

    def _target(self, node: Node) -> Target:
        """Return what serves a node; EROFS for a junction that covers nothing."""
        junction = self._junction(node)
        if junction is not None:
            under = self._under(junction)
            if under is None:
                raise refuse(errno.EROFS)
            return under
        index, inner = self._split(node)
        if index > len(self._providers) or (index, inner) in self._covered:
            raise refuse(errno.ESTALE)
        return Target(index, self._providers[index - 1], inner)

    def _under(self, junction: Junction) -> Target | None:
        """Return the directory that a junction covers, as it is now."""
        if junction.index:
            return Target(junction.index, self._providers[junction.index - 1], ROOT)
        above = self._under(junction.parent) if junction.parent is not None else None
        if above is None:
            return None
        index, provider, parent = above
        held = self._held.pop(junction.number, None)
        self._covered.discard((index, held or 0))
        try:
            entry = provider.lookup(parent, junction.name)
        except FileNotFoundError:
            return None
        finally:
            if held is not None:
                provider.forget(held, 1)
        if not stat.S_ISDIR(entry.attr.st_mode):
            provider.forget(entry.node, 1)
            return None
        self._held[junction.number] = entry.node
        self._covered.add((index, entry.node))
        return Target(index, provider, entry.node)

    def _provider_above(self, junction: Junction) -> int:
        while junction.parent is not None and not junction.index:
            junction = junction.parent
        return junction.index

    def _free(self, parent: Node, name: bytes) -> Target:
        """Return where something new goes, unless a route is there."""
        junction = self._junction(parent)
        if junction is not None and name in junction.routes:
            raise refuse(errno.EEXIST)
        return self._target(parent)

    def _movable(self, parent: Node, name: bytes) -> Target:
        junction = self._junction(parent)
        if junction is not None and name in junction.routes:
            raise refuse(errno.EBUSY)
        return self._target(parent)

    # What is told...

    def _told(self, index: int, attr: Attr) -> Attributes:
        return Attributes.of(attr, self._number(index, attr.st_ino))

    def _number(self, index: int, ino: int) -> int:
        """Return what the guest sees instead of an inode number of the provider `index`, or of a junction (0)."""
        if index and index == self._keeps_numbers:
            return ino
        below = (ino * self._base + index) & (_ELSEWHERE - 1)
        return (ino & ~(2 * _ELSEWHERE - 1)) | _ELSEWHERE | below

    def _entry(self, index: int, entry: Entry) -> Entry:
        node = self._joined(index, entry.node)
        return Entry(node, self._told(index, entry.attr), entry.lifetime)

    def _entered(self, junction: Junction) -> Entry:
        """Return the entry of a route or of a directory on the way to one."""
        if junction.routes:
            attr, lifetime = self._attributes_of(junction)
            return Entry(self._joined(0, junction.number), attr, lifetime)
        root, lifetime = self._providers[junction.index - 1].getattr(ROOT)
        node = self._joined(junction.index, ROOT)
        return Entry(node, self._told(junction.index, root), lifetime)

    def _attributes_of(self, junction: Junction) -> tuple[Attributes, Lifetime]:
        under = self._under(junction)
        if under is None:
            ino = self._number(0, junction.number)
            made = Attributes.made(ino, stat.S_IFDIR | 0o755, mtime_ns=self._made_ns)
            return made, _LIFETIME
        attr, lifetime = under.provider.getattr(under.node)
        return self._told(under.number, attr), lifetime

    def _listed(self, target: Target, offset: int, size: int) -> list[DirEntry]:
        entries = target.provider.readdir(target.node, offset, size)
        number, index = self._number, target.number
        return [
            DirEntry(entry.name, number(index, entry.ino), entry.kind, entry.offset)
            for entry in entries
        ]

    def _routes_of(self, junction: Junction, offset: int, *, dots: bool) -> list[DirEntry]:
        above = junction.parent or junction
        entries: list[tuple[bytes, Attr]] = [
            (name, self._entered(route).attr) for name, route in junction.routes.items()
        ]
        if dots:
            above = junction.parent or junction
            own = [
                (name, self._attributes_of(each)[0])
                for name, each in ((b".", junction), (b"..", above))
            ]
            entries = [*own, *entries]
        begin = max(0, offset - _FIRST_OFFSET)
        return [
            DirEntry(name, attr.st_ino, stat.S_IFMT(attr.st_mode) >> 12, _FIRST_OFFSET + place)
            for place, (name, attr) in enumerate(entries[begin:], start=begin + 1)
        ]


def _innermost(provider: Provider) -> Provider:
    while isinstance(provider, Wrapper):
        provider = provider.inner
    return provider
