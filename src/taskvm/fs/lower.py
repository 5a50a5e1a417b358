"""What overlayfs needs of the layer below it: what a guest has seen there does not vanish while it holds on to it.

Overlayfs keeps the nodes that it found, and answers ESTALE for a name, its own copy of the file included, once the
layer below says that the node is no longer there. So a node here is a name, not an inode:

1. A name that the host gives to another file of the same type stays the same node, with the new content.
2. A name that the host removes stays the same node, with the attributes it had; its listing is empty, its content
    ESTALE.
3. When the guest's kernel has forgotten a node, its name is looked up afresh.

It is never written to, so nothing that changes anything is here.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from taskvm.fs.attributes import Attributes
from taskvm.fs.provider import (
    ROOT,
    Absent,
    Change,
    DirEntry,
    Entry,
    Node,
    Provider,
    Source,
    refuse,
)
from taskvm.wire.fuse_replies import Attr, Lifetime, StatFs

# What the host has removed is asked for again each time: it may come back.
_UNSURE = Lifetime(entry_ns=0, attr_ns=0)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class PlaceState(msgspec.Struct, frozen=True, gc=False):
    """What of a place is saved with its guest: by node, that of the directory, and the inner provider's."""

    node: Node
    parent: Node
    name: bytes
    inner: Node
    references: int
    attr: Attributes  # when it was last seen


class LowerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a mount is saved with its guest."""

    following: Node
    places: list[PlaceState]
    inner: bytes


class Place:
    """One name that the guest knows. It holds one reference to the inner node."""

    __slots__ = ("attr", "children", "inner", "name", "node", "parent", "references")

    def __init__(
        self, node: Node, inner: Node, attr: Attributes, parent: Node, name: bytes
    ) -> None:
        self.node = node
        self.inner = inner
        self.attr = attr
        self.parent = parent
        self.name = name
        self.references = 0
        self.children: dict[bytes, Place] = {}


class Lower(Provider):
    """Serves `inner`, which is opened already and which this closes."""

    readonly = True

    def __init__(self, inner: Provider) -> None:
        self._inner = inner
        self._following: Node = ROOT + 1
        root = Place(ROOT, ROOT, _seen(inner.getattr(ROOT)[0]), ROOT, b"")
        self._places: dict[Node, Place] = {ROOT: root}
        self._by_inner: dict[Node, set[Node]] = {ROOT: {ROOT}}
        self.lasting = inner.lasting
        self.prompt = inner.prompt
        self.xattrs = inner.xattrs
        inner.changes = self._tell

    def close(self) -> None:
        self._inner.close()

    def sources(self) -> Sequence[Source]:
        return self._inner.sources()

    def rest(self) -> None:
        self._inner.rest()

    def export_state(self) -> bytes:
        places = [
            PlaceState(
                place.node, place.parent, place.name, place.inner, place.references, place.attr
            )
            for place in self._places.values()
            if place.node != ROOT
        ]
        state = LowerState(self._following, places, self._inner.export_state())
        return msgspec.msgpack.encode(state)

    def import_state(self, state: bytes) -> None:
        saved = msgspec.msgpack.decode(state, type=LowerState)
        self._following = saved.following
        for each in saved.places:
            place = Place(each.node, each.inner, each.attr, each.parent, each.name)
            place.references = each.references
            self._places[each.node] = place
            self._by_inner.setdefault(each.inner, set()).add(each.node)
        for place in self._places.values():
            parent = self._places.get(place.parent)
            if parent is not None and place.node != ROOT:
                parent.children[place.name] = place
        self._inner.import_state(saved.inner)

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        directory = self._at(parent)
        known = directory.children.get(name)
        try:
            found = self._inner.lookup(directory.inner, name)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            if known is None:
                raise error if isinstance(error, Absent) else refuse(errno.ENOENT) from None
            known.references += 1
            return Entry(known.node, known.attr, _UNSURE)
        place = self._bind(directory, name, found, known)
        place.attr = _seen(found.attr)
        place.references += 1
        return Entry(place.node, found.attr, found.lifetime)

    def forget(self, node: Node, count: int) -> None:
        place = self._places.get(node)
        if place is None or node == ROOT:
            return
        place.references -= count
        if place.references > 0:
            return
        del self._places[node]
        directory = self._places.get(place.parent)
        if directory is not None and directory.children.get(place.name) is place:
            del directory.children[place.name]
        self._release(place)

    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        try:
            return self._inner.readdir(self._at(node).inner, offset, size)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return []

    def readlink(self, node: Node) -> bytes:
        return self._inner.readlink(self._at(node).inner)

    # Attributes.

    def getattr(self, node: Node) -> tuple[Attr, Lifetime]:
        place = self._at(node)
        try:
            attr, lifetime = self._inner.getattr(place.inner)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return place.attr, _UNSURE
        place.attr = _seen(attr)
        return attr, lifetime

    def statfs(self, node: Node) -> StatFs:
        return self._inner.statfs(self._at(node).inner)

    def getxattr(self, node: Node, name: bytes) -> bytes:
        with _nothing_of_what_is_gone(errno.ENODATA):
            return self._inner.getxattr(self._at(node).inner, name)

    def listxattr(self, node: Node) -> list[bytes]:
        return self._inner.listxattr(self._at(node).inner)

    # Contents.

    def read(self, node: Node, offset: int, size: int) -> bytes:
        return self._inner.read(self._at(node).inner, offset, size)

    def seek(self, node: Node, offset: int, whence: int) -> int:
        return self._inner.seek(self._at(node).inner, offset, whence)

    # How.

    def _at(self, node: Node) -> Place:
        try:
            return self._places[node]
        except KeyError:
            raise refuse(errno.ESTALE) from None

    def _bind(self, directory: Place, name: bytes, found: Entry, known: Place | None) -> Place:
        """Return the place of what was just found, which takes over or gives back its reference."""
        if known is not None and known.inner == found.node:
            self._inner.forget(found.node, 1)
            return known
        if known is not None and _may_replace(known.attr, found.attr):
            self._release(known)
            known.inner = found.node
            self._by_inner.setdefault(found.node, set()).add(known.node)
            self.changes(Change(known.node))  # its pages are another file's
            return known
        place = Place(self._following, found.node, _seen(found.attr), directory.node, name)
        self._following += 1
        self._places[place.node] = directory.children[name] = place
        self._by_inner.setdefault(found.node, set()).add(place.node)
        return place

    def _release(self, place: Place) -> None:
        """Give back the reference to the inner node."""
        nodes = self._by_inner[place.inner]
        nodes.discard(place.node)
        if not nodes:
            del self._by_inner[place.inner]
        self._inner.forget(place.inner, 1)

    def _tell(self, change: Change) -> None:
        for node in tuple(self._by_inner.get(change.node, ())):
            self.changes(Change(node, change.name))


@contextmanager
def _nothing_of_what_is_gone(number: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _GONE:
            raise refuse(number) from None
        raise


def _may_replace(old: Attributes, new: Attr) -> bool:
    """A link is another node when it changes: the guest keeps what it read of one for good."""
    kind = stat.S_IFMT(old.st_mode)
    return kind == stat.S_IFMT(new.st_mode) and kind != stat.S_IFLNK


def _seen(attr: Attr) -> Attributes:
    return Attributes.of(attr, attr.st_ino)
