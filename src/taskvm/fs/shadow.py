"""A provider some of whose names do not exist for the guest.

Rule 1: what is hidden is absent: a lookup says ENOENT, and so do removing and moving it away. A listing leaves out what
    the patterns mean, but not another name of such a file, which no look at every file of a listing would be worth.
Rule 2: nothing is put at a hidden name, by creating, linking or moving, whether or not something is there: EACCES.
Rule 3: moving a directory never changes what is hidden in it: EACCES. All of it is looked at first, at most MAX_WALK
    names, unless the patterns judge names wherever they are.
Rule 4: what has a hidden name is hidden under each of its names. Hard links that the host made are found by one look
    through the tree, when the guest first meets a file with several names and every RELINK_S while it meets such files.
Rule 5: a node that the guest was not given does not exist, so a guessed number leads to nothing (Tracked).
Rule 6: the inner provider follows what the host moves, by each lookup. So each lookup here, of hidden names too, notes
    where it meets a node that the guest has: one that is elsewhere than the guest knows is barred (ESTALE), with all
    that is in it, until the guest finds it under a name that it may see, and the guest's kernel forgets what it kept of
    it. So is what loses its last name to the host, for nobody knows where it is by now; what is removed has no name
    that could be hidden. Names are looked at again when the provider tells of a change, and after NAME_AGE_S where it
    does not vouch for them longer.

A directory with something hidden in it cannot be removed: ENOTEMPTY, though it looks empty.
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Callable, Iterable

import msgspec

from taskvm.errors import UsageError
from taskvm.fs.memory import Memory
from taskvm.fs.patterns import Path, Patterns
from taskvm.fs.places import Place
from taskvm.fs.privatelayer import PrivateLayer
from taskvm.fs.provider import ROOT, Change, DirEntry, Entry, Node, Provider, refuse
from taskvm.fs.router import Router
from taskvm.fs.syscalls import RENAME_EXCHANGE
from taskvm.fs.tracked import Tracked
from taskvm.fs.walk import DT_DIR, DT_UNKNOWN, Found, walk
from taskvm.fs.wrapper import Wrapper

MAX_WALK = 1_000_000
RELINK_S = 60.0
# How long a name is taken to be where it was seen, where nobody tells of moves (rule 6); as long as HostTree does.
NAME_AGE_S = 1.0


class Shadow(Tracked):
    """Serves `inner` without what `patterns` mean: `.env`, `*.pem`, `/secrets/`, `!public.pem`, as in a .gitignore.

    Names are compared without regard to case. What is hidden cannot be read, listed, replaced or created. With
    `private` the guest may put things of its own there: each mount keeps them in a Memory like it, never in `inner`.
    """

    def __init__(
        self, inner: Provider, patterns: Iterable[str], *, private: Memory | None = None
    ) -> None:
        self.patterns = Patterns(patterns)
        self.private = private
        if private is not None and _has_private_layer(inner):
            raise UsageError(
                f"keep what {self.patterns} mean in a private layer",
                "there is one below it already",
                "Give all patterns to one Shadow",
            )
        super().__init__(inner)

    def opened(self) -> Provider:
        served = super().opened()
        if self.private is None:
            return served
        assert isinstance(served, Shadow)
        served.private = None
        return PrivateLayer(served, self.private.opened())

    @property
    def prompt(self) -> bool:  # type: ignore[override]  # as in the base class
        return self.inner.prompt

    @property
    def readonly(self) -> bool:  # type: ignore[override]  # as in the base class
        return self.private is None and self.inner.readonly

    def begin(self) -> None:
        super().begin()
        self._links: frozenset[Node] = frozenset()  # hidden files that have further names
        self._links_seen: float | None = None
        self._barred: set[Node] = set()  # rule 6
        self._suspects: set[Node] = set()  # whose names the host has changed, as the provider told
        self._due: dict[Node, float] = {}  # of names that nobody watches: when to look again

    def export_state(self) -> bytes:
        return msgspec.msgpack.encode((super().export_state(), self._barred))

    def import_state(self, state: bytes) -> None:
        tracked, self._barred = msgspec.msgpack.decode(state, type=tuple[bytes, set[int]])
        super().import_state(tracked)
        self._due = {place.node: 0.0 for place in self.places.export()}  # nobody watched meanwhile

    def place(self, node: Node) -> Place:
        due = self._due.get(node)
        if due is not None and due <= time.monotonic():
            self._suspects.add(node)
            self._due[node] = time.monotonic() + NAME_AGE_S
        if self._suspects:
            self._look_again()
        if node in self._links or node in self._barred:
            raise refuse(errno.ESTALE)
        return super().place(node)

    def bound(self, parent: Place, name: bytes, entry: Entry) -> Entry:
        before = parent.children.get(name)
        elsewhere = before is None or before.node != entry.node
        known = self.places.knows(entry.node)
        if elsewhere:
            self._leave(parent, name)
        told = super().bound(parent, name, entry)
        if elsewhere and known:
            self._judge(self.places[entry.node])
        self._note_age(entry)
        return told

    def forget(self, node: Node, count: int) -> None:
        for gone in self.places.forget(node, count):
            self._barred.discard(gone.node)
            self._due.pop(gone.node, None)
            self.inner.forget(gone.node, gone.handed)

    # What the provider tells by itself must not name what is hidden.

    @property
    def changes(self) -> Callable[[Change], None]:
        return self.inner.changes

    @changes.setter
    def changes(self, listener: Callable[[Change], None]) -> None:
        def tell(change: Change) -> None:
            try:
                place = self.places[change.node]
                if change.name is not None:
                    if change.name in place.children:
                        self._suspects.add(place.children[change.name].node)
                    if self._is_never_shown(place.below(change.name)):
                        return
            except OSError:
                return  # nobody was told of this node
            listener(change)

        self.inner.changes = tell

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        place = self.place(parent)
        path = place.below(name)
        if self._is_never_shown(path):
            raise refuse(errno.ENOENT)
        entry = self._look(parent, name)
        if self._is_hidden(path, entry):
            self.inner.forget(entry.node, 1)
            raise refuse(errno.ENOENT)
        told = self.bound(place, name, entry)
        if entry.node in self._barred:
            self._suspects.add(entry.node)  # by another of its names, unless that is gone
            self._look_again()
        if entry.node in self._barred:
            self.forget(entry.node, 1)
            raise refuse(errno.ENOENT)
        return told

    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        place = self.place(node)
        while True:
            entries = self.inner.readdir(node, offset, size)
            shown = [entry for entry in entries if self._is_shown(place, entry)]
            if shown or not entries:  # an empty answer would be the end
                return shown
            offset = entries[-1].offset

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        self._refuse_hidden(parent, name)
        return super().create(parent, name, mode, flags)

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        self._refuse_hidden(parent, name)
        return super().mknod(parent, name, mode)

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        self._refuse_hidden(parent, name)
        return super().mkdir(parent, name, mode)

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        self._refuse_hidden(parent, name)
        return super().symlink(parent, name, target)

    def link(self, node: Node, parent: Node, name: bytes) -> Entry:
        self._refuse_hidden(parent, name)
        return super().link(node, parent, name)

    def unlink(self, parent: Node, name: bytes) -> None:
        self._kind_of(parent, name)
        super().unlink(parent, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        self._kind_of(parent, name)
        super().rmdir(parent, name)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        directory = self._kind_of(parent, name)
        self._refuse_hidden(new_parent, new_name)
        if directory:
            self._refuse_exposure(parent, name, new_parent, new_name)
        if flags & RENAME_EXCHANGE:
            self._refuse_hidden(parent, name)
            if self._kind_of(new_parent, new_name):
                self._refuse_exposure(new_parent, new_name, parent, name)
        super().rename(parent, name, new_parent, new_name, flags)

    # Judging...

    def _is_never_shown(self, path: Path) -> bool:
        return self.patterns.hides(path, directory=False) and self.patterns.hides(
            path, directory=True
        )

    def _is_hidden(self, path: Path, entry: Entry) -> bool:
        mode = entry.attr.st_mode
        if stat.S_ISREG(mode) and entry.attr.st_nlink > 1:
            self._find_links()
        return entry.node in self._links or self.patterns.hides(path, directory=stat.S_ISDIR(mode))

    def _is_shown(self, place: Place, entry: DirEntry) -> bool:
        if entry.name in (b".", b".."):
            return True
        path = place.below(entry.name)
        if entry.kind == DT_UNKNOWN:
            return not self.patterns.may_hide(path)
        return not self.patterns.hides(path, directory=entry.kind == DT_DIR)

    def _refuse_hidden(self, parent: Node, name: bytes) -> None:
        path = self.place(parent).below(name)
        if self.patterns.may_hide(path):
            raise refuse(errno.EACCES)
        try:
            there = self._look(parent, name)
        except FileNotFoundError:
            return
        try:
            if self._is_hidden(
                path, there
            ):  # by another of its names: opening it to write would cut it
                raise refuse(errno.EACCES)
        finally:
            self.inner.forget(there.node, 1)

    def _kind_of(self, parent: Node, name: bytes) -> bool:
        """Say whether `name` is a directory; ENOENT when the guest sees nothing there."""
        path = self.place(parent).below(name)
        if self._is_never_shown(path):
            raise refuse(errno.ENOENT)
        entry = self._look(parent, name)
        try:
            if self._is_hidden(path, entry):
                raise refuse(errno.ENOENT)
        finally:
            self.inner.forget(entry.node, 1)
        return stat.S_ISDIR(entry.attr.st_mode)

    # Looking at what is there, hidden or not (rule 6)...

    def _look(self, parent: Node, name: bytes) -> Entry:
        """Look up, with one reference, and note where it is that the guest knows what is met."""
        directory = self.places[parent] if self.places.knows(parent) else None
        before = None if directory is None else directory.children.get(name)
        try:
            entry = self.inner.lookup(parent, name)
        except FileNotFoundError:
            if directory is not None:
                self._leave(directory, name)
            raise
        if before is not None and before.node == entry.node:
            self._note_age(entry)
            return entry
        if directory is not None:
            self._leave(directory, name)
        # A file with several names can have this one beside those that the guest knows.
        alone = stat.S_ISDIR(entry.attr.st_mode) or entry.attr.st_nlink < 2
        if alone and self.places.knows(entry.node) and entry.node != ROOT:
            place = self.places[entry.node]
            for up, old in list(place.names):
                self.places.unbind(up, old)
            self._bar(_all_of(place))
        return entry

    def _note_age(self, entry: Entry) -> None:
        """Remember to look again at a name that the inner provider does not vouch for."""
        if entry.lifetime.entry_ns > NAME_AGE_S * 1e9:
            self._due.pop(entry.node, None)
        else:
            self._due[entry.node] = time.monotonic() + NAME_AGE_S

    def _leave(self, directory: Place, name: bytes) -> None:
        """Note that a name does not stand any more for what the guest knows by it, which the guest has not caused."""
        place = directory.children.get(name)
        if place is None:
            return
        self.places.unbind(directory, name)
        if not place.names and not self._is_removed(place.node):
            self._bar(_all_of(place))

    def _look_again(self) -> None:
        """Look at each name of what the host may have moved."""
        while self._suspects:
            node = self._suspects.pop()
            if not self.places.knows(node):
                continue
            for parent, name in list(self.places[node].names):
                try:
                    self.inner.forget(self._look(parent.node, name).node, 1)
                except FileNotFoundError:
                    pass  # noted
                except OSError:  # it may be anywhere
                    self._leave(parent, name)
            if node in self._barred:
                self._judge(self.places[node])

    def _is_removed(self, node: Node) -> bool:
        try:
            return self.inner.getattr(node)[0].st_nlink == 0
        except OSError:
            return False

    def _bar(self, places: Iterable[Place]) -> None:
        for place in places:
            if place.node not in self._barred:
                self._barred.add(place.node)
                # A listing or a page that the guest's kernel keeps is not asked for again.
                self.changes(Change(place.node))

    def _judge(self, top: Place) -> None:
        """Bar what is hidden where it is by now, and nothing else."""
        for place in _all_of(top):
            if self._is_hidden_by_path(place):
                self._bar([place])
            else:
                self._barred.discard(place.node)

    def _is_hidden_by_path(self, place: Place) -> bool:
        known = False
        for parent, name in place.names:
            try:
                path = parent.below(name)
            except OSError:
                continue  # no way leads there from the root any more
            known = True
            if self.patterns.hides(path, directory=place.directory):
                return True
        return not known

    def _refuse_exposure(self, parent: Node, name: bytes, to: Node, new_name: bytes) -> None:
        """Refuse to move a directory when something in it would appear, or disappear, by that."""
        if self.patterns.by_name:
            return
        old, new = self.place(parent).below(name), self.place(to).below(new_name)
        hides = self.patterns.hides
        moved = self._look(parent, name).node
        try:
            for seen, found in enumerate(walk(self.inner, moved, self._look)):
                before, after = (
                    hides(top + found.path, directory=found.directory) for top in (old, new)
                )
                # With too much to look at, nobody can say that nothing changes.
                if before != after or seen > MAX_WALK:
                    raise refuse(errno.EACCES)
        finally:
            self.inner.forget(moved, 1)

    def _find_links(self) -> None:
        """Find the hidden files that have other names too, unless that was done a moment ago.

        What is in a directory that this user may not list, or mounted inside, is not found: a project with one such
        directory (a database's, made by a container) would have no file with several names.
        """
        now = time.monotonic()
        if self._links_seen is not None and now - self._links_seen < RELINK_S:
            return
        links: set[Node] = set()
        try:
            for seen, found in enumerate(walk(self.inner, ROOT, self._look, skip_closed=True)):
                if seen > MAX_WALK:
                    raise refuse(errno.EACCES)
                if not found.directory and self.patterns.hides(found.path, directory=False):
                    self._add_link(links, found)
        except BaseException:
            self._release(links)
            raise
        self._release(self._links)
        self._links, self._links_seen = frozenset(links), now

    def _add_link(self, links: set[Node], found: Found) -> None:
        """Keep the node of a hidden file that has several names; the reference makes it stay the same."""
        try:
            entry = self._look(found.parent, found.name)
        except (FileNotFoundError, PermissionError):
            return
        if entry.attr.st_nlink > 1 and entry.node not in links:
            links.add(entry.node)
        else:
            self.inner.forget(entry.node, 1)

    def _release(self, links: Iterable[Node]) -> None:
        for node in links:
            self.inner.forget(node, 1)


def _all_of(top: Place) -> list[Place]:
    """Return a node and all that the guest knows below it."""
    found, waiting = {top.node: top}, [top]
    while waiting:
        for child in waiting.pop().children.values():
            if child.node not in found:  # the host can move directories so that this is a circle
                found[child.node] = child
                waiting.append(child)
    return list(found.values())


def _has_private_layer(provider: Provider) -> bool:
    if isinstance(provider, Router):
        return any(_has_private_layer(each) for each in provider.providers)
    if isinstance(provider, Shadow) and provider.private is not None:
        return True
    return isinstance(provider, Wrapper) and _has_private_layer(provider.inner)
