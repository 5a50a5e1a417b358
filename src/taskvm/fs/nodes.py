"""Which inode of the host each node of a HostDir is, and under which names the guest knows it.

A node is an inode (device, number, type, birth), so hard links are one node, and lives while the guest's kernel holds
references. Its places are the names it was last seen under; nothing here touches the host, and a place may be out of
date: who uses one compares the identity of what it finds, and drops it (`leave`) when there is another.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from taskvm.fs.provider import ROOT, Node, refuse

# Of nodes, and of their names: a guest that never forgets is stopped here (ENFILE). A node costs about 900 bytes and a
# further name 170, besides the name itself; the guest's kernel pays as much for each that it remembers.
MAX_NODES = 1_000_000

Identity = tuple[int, int, int, int]
UNTOLD = (0, -1)  # no file has this size


class Identified(Protocol):
    """What an identity is made of."""

    @property
    def st_dev(self) -> int: ...
    @property
    def st_ino(self) -> int: ...
    @property
    def st_mode(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_birth_ns(self) -> int: ...


class Seen(Identified, Protocol):
    """What tells also whether there can be another name."""

    @property
    def st_nlink(self) -> int: ...


def identity(attr: Identified) -> Identity:
    """Return what tells one inode from another.

    File systems use inode numbers again at once, hence the time of birth. Where there is none, a symbolic link that was
    made anew must be another node all the same, for the guest caches its target for good: its mtime takes the place.
    """
    kind = stat.S_IFMT(attr.st_mode)
    birth = attr.st_birth_ns or (attr.st_mtime_ns if kind == stat.S_IFLNK else 0)
    return (attr.st_dev, attr.st_ino, kind, birth)


@dataclass(slots=True)
class Watched:
    """What a guest remembers of a directory that inotify watches."""

    wd: int
    absent: set[bytes] = field(default_factory=set)  # names that it was told not to be there
    listed: bool = False  # it may have kept a listing


class NodeState(msgspec.Struct, frozen=True, array_like=True):
    """A node as it is saved."""

    id: Node
    references: int
    identity: Identity
    places: list[tuple[Node, bytes]]
    told: tuple[int, int] | None
    absent: list[bytes] | None


class HostNode:
    """One inode that the guest knows.

    `told` is (ctime, size) as the guest was last told them, at the time `told_ns`; UNTOLD when it holds contents and
    was told no attributes since it changed something; None when it trusts nothing. It is `astray` from when the host
    took a name of it away until it is seen under one: no watch tells of it.
    """

    __slots__ = (
        "astray",
        "children",
        "id",
        "identity",
        "places",
        "references",
        "told",
        "told_ns",
        "watched",
    )

    def __init__(self, number: Node, identity: Identity) -> None:
        self.id: Node = number
        self.identity: Identity = identity
        self.references: int = 0
        self.places: list[tuple[HostNode, bytes]] = []
        self.children: dict[bytes, HostNode] = {}
        self.told: tuple[int, int] | None = None
        self.told_ns: int = 0
        self.watched: Watched | None = None
        self.astray: bool = False

    @property
    def kind(self) -> int:
        """The type, as stat.S_IFMT returns it."""
        return self.identity[2]


class NodeTable:
    """All nodes of one HostDir."""

    def __init__(self, root: Identified) -> None:
        self.root: HostNode = HostNode(ROOT, identity(root))
        self._by_id: dict[Node, HostNode] = {ROOT: self.root}
        self._by_identity: dict[Identity, HostNode] = {self.root.identity: self.root}
        self._next = ROOT + 1
        self._names = 0
        # Names of what the host moved and the guest met at another place: it may know them still.
        self.left: list[tuple[Node, bytes]] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[HostNode]:
        return iter(list(self._by_id.values()))

    def __getitem__(self, number: Node) -> HostNode:
        try:
            return self._by_id[number]
        except KeyError:
            raise refuse(errno.ESTALE) from None

    def get(self, number: Node) -> HostNode | None:
        """Return the node, if the guest knows it."""
        return self._by_id.get(number)

    def known(self, inode: Identity) -> HostNode | None:
        """Return the node of an inode, if the guest knows it."""
        return self._by_identity.get(inode)

    def bind(self, parent: HostNode, name: bytes, attr: Seen) -> HostNode:
        """Return the node of what was just seen as `name` in `parent`, with one reference more."""
        if self._names >= MAX_NODES and name not in parent.children:
            raise refuse(errno.ENFILE)  # hard links: no new node, and memory all the same
        key = identity(attr)
        node = self._by_identity.get(key)
        if node is None:
            node = self._add(key)
        node.references += 1
        node.astray = False
        if parent.children.get(name) is not node:
            self._place(node, parent, name)
        if attr.st_nlink == 1 and len(node.places) > 1:  # it was moved here by the host
            self.unbind(parent, name)
            self._leave_all(node)
            self._place(node, parent, name)
        return node

    def leave(self, parent: HostNode, name: bytes) -> None:
        """Note that `name` in `parent` is not what the guest knows by it, and has yet to be told."""
        self.unbind(parent, name)
        self.left.append((parent.id, name))

    def unbind(self, parent: HostNode, name: bytes) -> None:
        """Note that `name` in `parent` no longer stands for what it did."""
        node = parent.children.pop(name, None)
        if node is not None:
            node.places.remove((parent, name))
            self._names -= 1

    def move(self, parent: HostNode, name: bytes, new_parent: HostNode, new_name: bytes) -> None:
        """Note that a name was moved, over another one if there was one."""
        node = parent.children.get(name)
        self.unbind(parent, name)
        self.unbind(new_parent, new_name)
        if node is not None:
            self._place(node, new_parent, new_name)

    def exchange(
        self, parent: HostNode, name: bytes, new_parent: HostNode, new_name: bytes
    ) -> None:
        """Note that two names were exchanged."""
        first, second = parent.children.get(name), new_parent.children.get(new_name)
        self.unbind(parent, name)
        self.unbind(new_parent, new_name)
        if first is not None:
            self._place(first, new_parent, new_name)
        if second is not None:
            self._place(second, parent, name)

    def forget(self, number: Node, count: int) -> HostNode | None:
        """Drop `count` references; return the node if it is gone with them."""
        node = self._by_id.get(number)
        if node is None or number == ROOT:
            return None
        node.references -= count
        if node.references > 0:
            return None
        self._unplace(node)
        del self._by_id[number]
        if self._by_identity.get(node.identity) is node:
            del self._by_identity[node.identity]
        return node

    def reidentify(self, node: HostNode, attr: Identified) -> None:
        """Note that a change which the guest asked for changed the identity of `node`."""
        if self._by_identity.get(node.identity) is node:
            del self._by_identity[node.identity]
        node.identity = identity(attr)
        self._by_identity[node.identity] = node

    def export(self) -> list[NodeState]:
        """Return all nodes, in no order."""
        return [
            NodeState(
                node.id,
                node.references,
                node.identity,
                # A directory that the guest forgot before what is in it is a place no more.
                [(up.id, name) for up, name in node.places if self._by_id.get(up.id) is up],
                node.told,
                None if node.watched is None else list(node.watched.absent),
            )
            for node in self
        ]

    def restore(self, states: list[NodeState]) -> None:
        """Know, in an empty table, the nodes of an earlier one. Raises ValueError when they do not fit together.

        The root is the one of now, and devices are numbered as it is: the host may have been started anew.
        """
        old_root = next((state for state in states if state.id == ROOT), None)
        if old_root is None or old_root.identity[1:] != self.root.identity[1:]:
            raise ValueError("the saved nodes are those of another directory")
        for state in states:
            node = self.root if state.id == ROOT else self._restored(state, old_root.identity[0])
            node.told = state.told
        for state in states:
            for parent, name in state.places:
                if parent not in self._by_id:
                    raise ValueError(f"the saved node {state.id} is in a directory that is not")
                self._place(self._by_id[state.id], self._by_id[parent], name)

    def _restored(self, state: NodeState, old_device: int) -> HostNode:
        device = state.identity[0]
        key = (self.root.identity[0] if device == old_device else device, *state.identity[1:])
        node = HostNode(state.id, key)
        node.references = state.references
        self._by_id[node.id] = self._by_identity[key] = node
        self._next = max(self._next, node.id + 1)
        return node

    def _add(self, key: Identity) -> HostNode:
        if len(self._by_id) >= MAX_NODES:
            raise refuse(errno.ENFILE)
        node = HostNode(self._next, key)
        self._next += 1
        self._by_id[node.id] = self._by_identity[key] = node
        return node

    def _place(self, node: HostNode, parent: HostNode, name: bytes) -> None:
        self.unbind(parent, name)
        if node.kind == stat.S_IFDIR:  # a directory has one name: it was moved by the host
            self._leave_all(node)
        self._names += 1
        node.places.append((parent, name))
        parent.children[name] = node

    def _leave_all(self, node: HostNode) -> None:
        self.left += [(parent.id, name) for parent, name in node.places]
        self._unplace(node)

    def _unplace(self, node: HostNode) -> None:
        for parent, name in node.places:
            del parent.children[name]
        self._names -= len(node.places)
        node.places.clear()
