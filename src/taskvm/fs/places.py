"""Which nodes of an inner provider a guest knows, and under which names: for wrappers that judge by path.

Rule 1: a node that was not handed out, or was forgotten, is ESTALE. A guest cannot use a number that it guessed.
Rule 2: a directory has one name, and is remembered as long as anything in it is, also when the guest forgets it: no
    path is ever made of names that were moved since.
Rule 3: what is no longer connected to the root has no path below it.
"""

from __future__ import annotations

import errno

import msgspec

from taskvm.fs.provider import ROOT, Node, refuse

Path = tuple[bytes, ...]

# Far deeper than PATH_MAX allows; the host can move directories so that what was seen of them is a circle.
MAX_DEPTH = 4096


class PlaceState(msgspec.Struct, frozen=True, array_like=True):
    """A place as it is saved."""

    node: Node
    directory: bool
    references: int
    handed: int
    names: list[tuple[Node, bytes]]
    last: list[bytes]


class Place:
    """One node that the guest knows. `handed` counts all references that the guest was given, ever."""

    __slots__ = ("children", "directory", "handed", "last", "names", "node", "references")

    def __init__(self, node: Node, *, directory: bool) -> None:
        self.node: Node = node
        self.directory: bool = directory
        self.references: int = 0
        self.handed: int = 0
        self.names: list[tuple[Place, bytes]] = []
        self.children: dict[bytes, Place] = {}
        self.last: Path = ()

    @property
    def path(self) -> Path:
        """The names from the root to here; where something was unlinked, those that it had last."""
        top, steps = self._climb()
        return top.last + steps

    def below(self, name: bytes) -> Path:
        """Return the path of `name` in this directory. Raises ESTALE when there is no way to it."""
        top, steps = self._climb()
        if top.node != ROOT:
            raise refuse(errno.ESTALE)
        return (*steps, name)

    def _climb(self) -> tuple[Place, Path]:
        steps: list[bytes] = []
        place = self
        while place.names:
            place, name = place.names[-1]
            steps.append(name)
            if len(steps) > MAX_DEPTH:
                raise refuse(errno.ESTALE)
        return place, tuple(reversed(steps))


class Places:
    """All nodes of one provider that one guest knows."""

    def __init__(self) -> None:
        self._by_node: dict[Node, Place] = {ROOT: Place(ROOT, directory=True)}
        self._suspects: list[Place] = []  # that may not be needed any more

    def __getitem__(self, node: Node) -> Place:
        try:
            return self._by_node[node]
        except KeyError:
            raise refuse(errno.ESTALE) from None

    def knows(self, node: Node) -> bool:
        """Say whether the guest has `node`."""
        return node in self._by_node

    def __len__(self) -> int:
        return len(self._by_node)

    def bind(self, parent: Place, name: bytes, node: Node, *, directory: bool) -> Place:
        """Note that the guest is told `node` as `name` in `parent`; one reference more."""
        place = self._by_node.get(node)
        if place is None:
            place = self._by_node[node] = Place(node, directory=directory)
        place.references += 1
        place.handed += 1
        if parent.children.get(name) is not place:
            self._put(place, parent, name)
        return place

    def unbind(self, parent: Place, name: bytes) -> None:
        """Note that a name does not stand for what it did."""
        place = parent.children.get(name)
        if place is None:
            return
        place.last = place.path
        del parent.children[name]
        place.names.remove((parent, name))
        self._suspects += (place, parent)

    def move(self, parent: Place, name: bytes, new_parent: Place, new_name: bytes) -> None:
        """Note that a name was moved, over another one if there was one."""
        place = parent.children.get(name)
        self.unbind(parent, name)
        self.unbind(new_parent, new_name)
        if place is not None:
            self._put(place, new_parent, new_name)

    def exchange(self, parent: Place, name: bytes, new_parent: Place, new_name: bytes) -> None:
        """Note that two names were exchanged."""
        first, second = parent.children.get(name), new_parent.children.get(new_name)
        self.unbind(parent, name)
        self.unbind(new_parent, new_name)
        if first is not None:
            self._put(first, new_parent, new_name)
        if second is not None:
            self._put(second, parent, name)

    def forget(self, node: Node, count: int) -> list[Place]:
        """Drop references, and return what nobody needs any more: the inner provider may forget all of it."""
        place = self._by_node.get(node)
        if place is not None:
            place.references = max(0, place.references - count)
            self._suspects.append(place)
        gone = []
        while self._suspects:
            place = self._suspects.pop()
            if self._is_needed(place):
                continue
            del self._by_node[place.node]
            gone.append(place)
            for parent, name in list(place.names):
                self.unbind(parent, name)
        return gone

    def export(self) -> list[PlaceState]:
        """Return all places, in no order."""
        return [
            PlaceState(
                place.node,
                place.directory,
                place.references,
                place.handed,
                [(parent.node, name) for parent, name in place.names],
                list(place.last),
            )
            for place in self._by_node.values()
        ]

    def restore(self, states: list[PlaceState]) -> None:
        """Know, in an empty table, what another one has exported. Raises ValueError."""
        for state in states:
            place = Place(state.node, directory=state.directory)
            place.references, place.handed = state.references, state.handed
            place.last = tuple(state.last)
            self._by_node[state.node] = place
        for state in states:
            for parent, name in state.names:
                if parent not in self._by_node:
                    raise ValueError(f"the saved node {state.node} is in a directory that is not")
                self._put(self._by_node[state.node], self._by_node[parent], name)

    def _is_needed(self, place: Place) -> bool:
        known = self._by_node.get(place.node) is place
        return not known or place.node == ROOT or place.references > 0 or bool(place.children)

    def _put(self, place: Place, parent: Place, name: bytes) -> None:
        self.unbind(parent, name)
        if place.directory:  # it has one name, so it was moved
            for old_parent, old_name in list(place.names):
                self.unbind(old_parent, old_name)
        place.names.append((parent, name))
        parent.children[name] = place
