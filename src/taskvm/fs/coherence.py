"""What a guest was told of a directory of the host, and when that stops being true. Told by inotify; no thread.

A guest may believe what it was told for LONG where a watch tells of changes, for SHORT everywhere else: on file systems
that others change (NFS, FUSE), beyond the limit of watches, for files with several names (a change through another
name causes no event here), and for directories that nobody has looked into yet.

1. A directory is watched before anything in it is told, so no change falls between.
2. The guest's own changes are expected: an event for a name is dropped if this server caused it. The kernel queues
   events before the call returns, so whatever is expected has arrived by the next reading.
3. An event for contents or attributes counts when (ctime, size) is not what the guest was told last; also when they
   were told within TICK of the ctime, for a second change in that time has the same one (before Linux 6.13). A close
   after writing counts unless it is this server's: a second store to a page that is dirty already changes no time.
4. What the guest no longer believes is not told again: the host may write a file a thousand times for one message. It
   believes again what it asks for, contents too. Of what it changed itself it keeps the contents: a program that has
   the file open, or mapped, reads them without a question about attributes.
5. Lost events make everything doubtful, and the guest is told so; a part at a time, for it may know a million names.
"""

from __future__ import annotations

import itertools
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from taskvm.fs import inotify
from taskvm.fs.hosttree import HostTree
from taskvm.fs.inotify import Event, Inotify
from taskvm.fs.nodes import UNTOLD, HostNode, NodeState, Watched
from taskvm.fs.provider import Change, Node
from taskvm.wire.fuse_replies import Attr, Lifetime

_SECOND_NS = 1_000_000_000
SHORT_NS = _SECOND_NS
LONG_NS = 3600 * _SECOND_NS
# The clock of inode times ticks with CONFIG_HZ, at least 100.
TICK_NS = 20_000_000
# The answer that told it may still be under way in the guest: only a message for its name waits for that.
YOUNG_NS = _SECOND_NS
# Names that a guest was told not to be there: a guest cannot make the host remember more.
MAX_ABSENT_IN_DIRECTORY = 1024
MAX_ABSENT = 100_000
DOUBTS_AT_ONCE = 2048
SHORT = Lifetime(entry_ns=SHORT_NS, attr_ns=SHORT_NS)
# Of each there is one event for one cause; of others the kernel makes one of several that follow each other.
_COUNTED = inotify.NAMES | inotify.CLOSE_WRITE
_NAME_ONLY = Lifetime(entry_ns=LONG_NS, attr_ns=SHORT_NS)
_LONG = Lifetime(entry_ns=LONG_NS, attr_ns=LONG_NS)

# linux/magic.h: file systems that only this kernel changes: ext4, XFS, btrfs, tmpfs, F2FS, bcachefs, ZFS, overlayfs.
LOCAL = frozenset(
    {
        0xEF53,
        0x58465342,
        0x9123683E,
        0x01021994,
        0xF2F52010,
        0xCA451A4E,
        0x2FC12FC1,
        0x794C7630,
    }
)
# All of a user's programs share this limit: one mount takes at most a sixteenth.
_WATCHES_FILE = Path("/proc/sys/fs/inotify/max_user_watches")


class Coherence:
    """Keeps true what one guest was told of `tree`; `tell` takes what it must forget. Without `live` all is SHORT."""

    def __init__(
        self, tree: HostTree, tell: Callable[[Change], None], *, live: bool = True
    ) -> None:
        self._tree = tree
        self._tell = tell
        self._by_wd: dict[int, HostNode] = {}
        self._expected: Counter[tuple[int, bytes, int]] = Counter()
        self._absent = 0
        self._told: dict[Change, None] = {}  # by one reading: each once, in order
        self._doubtful: Iterator[HostNode] | None = None  # of whom the guest has yet to be told
        self._lost_again = False  # more events meanwhile
        self._inotify: Inotify | None = None
        if live and tree.filesystem in LOCAL:
            with suppress(OSError):
                self._inotify = Inotify()
        self._budget = _budget() if self._inotify is not None else 0

    @property
    def fd(self) -> int | None:
        """What is readable when `attend` has something to do, or None without inotify."""
        return None if self._inotify is None else self._inotify.fd

    def close(self) -> None:
        """End all watches. Idempotent."""
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    # What the guest is told.

    def watch(self, directory: HostNode) -> None:
        """Watch a directory that the guest is about to be told of, if it may be."""
        if directory.watched is not None or len(self._by_wd) >= self._budget:
            return
        if self._inotify is None:
            return
        fd = self._tree.walk(directory)
        try:
            wd = self._inotify.add(fd)
        except OSError:
            self._budget = len(self._by_wd)  # the user's limit: not asked again and again
            return
        if wd not in self._by_wd:  # else another node is the same directory: the host moves it
            directory.watched = Watched(wd)
            self._by_wd[wd] = directory

    def lifetime(self, node: HostNode, attr: Attr, directory: HostNode | None = None) -> Lifetime:
        """Return how long the guest may believe `attr`, and that `node` is in `directory`; note that it was told."""
        self._tell_left()
        node.told = (attr.st_ctime_ns, attr.st_size)
        node.told_ns = time.time_ns()
        if not self._by_wd:
            return SHORT
        is_directory = node.kind == stat.S_IFDIR
        lasts = node.watched is not None if is_directory else attr.st_nlink == 1
        if not node.places:
            return _LONG if lasts and node is self._tree.nodes.root else SHORT
        if node.astray or (directory or node.places[-1][0]).watched is None:
            return SHORT
        return _LONG if lasts else _NAME_ONLY

    def absent(self, directory: HostNode, name: bytes) -> int:
        """Return for how many ns the guest may believe that `name` is not there; note that it was told."""
        watched = directory.watched
        if watched is None:
            return 0
        if name not in watched.absent:
            if len(watched.absent) >= MAX_ABSENT_IN_DIRECTORY or self._absent >= MAX_ABSENT:
                return 0
            watched.absent.add(name)
            self._absent += 1
        return LONG_NS

    def listed(self, directory: HostNode) -> None:
        """Note that the guest reads the names in a directory, and may keep them."""
        if directory.watched is not None:
            directory.watched.listed = True

    def forget(self, directory: HostNode) -> None:
        """Watch no longer what the guest does not know any more."""
        watched, directory.watched = directory.watched, None
        if watched is not None and self._inotify is not None:
            self._absent -= len(watched.absent)
            if self._by_wd.pop(watched.wd, None) is not None:
                self._inotify.remove(watched.wd)

    # What the guest does. Its kernel forgets by itself what that makes wrong.

    def names_changed(self, directory: HostNode, name: bytes, event: int) -> None:
        """Expect the event of a change to a name that the guest asked for."""
        directory.told = None
        watched = directory.watched
        if watched is None:
            return
        self.present(directory, name)
        watched.listed = False
        self._expected[watched.wd, name, event] += 1

    def present(self, directory: HostNode, name: bytes) -> None:
        """Note that the guest knows of a name that there is one."""
        watched = directory.watched
        if watched is not None and name in watched.absent:
            watched.absent.remove(name)
            self._absent -= 1

    def contents_changed(self, node: HostNode, event: int) -> None:
        """Expect the event of a change to contents or attributes that the guest asked for."""
        node.told = UNTOLD
        self.expect(node, event)

    def contents_read(self, node: HostNode) -> None:
        """Note that the guest has contents, which it may have asked for without asking for attributes."""
        if node.told is None:
            node.told = UNTOLD

    def expect(self, node: HostNode, event: int) -> None:
        """Expect an event of `node` that the guest caused before it was told what is now."""
        for directory, name in node.places:
            if directory.watched is not None:
                self._expected[directory.watched.wd, name, event] = 1
        if node.watched is not None:
            self._expected[node.watched.wd, b"", event] = 1

    def closed(self, number: Node) -> None:
        """Expect the event of a descriptor for writing that this server has just closed."""
        node = self._tree.nodes.get(number)
        for directory, name in node.places if node is not None else ():
            if directory.watched is not None:
                self._expected[directory.watched.wd, name, inotify.CLOSE_WRITE] += 1

    # What the host does.

    def attend(self) -> None:
        """Read what has happened, at most so much at once that no request waits long, and tell what matters."""
        if self._inotify is None:
            return
        for event in self._inotify.read():
            self._take(event)
        if not self._inotify.pending():
            self._expected.clear()
        self._doubt_more()
        told, self._told = self._told, {}
        for change in told:
            self._tell(change)
        self._tell_left()

    def _doubt_everything(self) -> None:
        if self._doubtful is None:
            self._doubtful = iter(self._tree.nodes)
        else:
            self._lost_again = True  # after those, so that all have their turn

    def _doubt_more(self) -> None:
        """Tell of the next part of what may be wrong, and let what is left be told when the guest had its turn."""
        while self._doubtful is not None and self._inotify is not None:
            self._doubt_some(self._doubtful)
            with suppress(OSError):  # no more watches for this user: all at once
                if self._doubtful is not None:
                    self._inotify.poke()
                return

    def _doubt_some(self, doubtful: Iterator[HostNode]) -> None:
        nodes = list(itertools.islice(doubtful, DOUBTS_AT_ONCE))
        for node in nodes:
            if self._tree.nodes.get(node.id) is node:
                for directory, name in node.places:
                    self._tell(Change(directory.id, name))
                self._doubt(node)
        if len(nodes) < DOUBTS_AT_ONCE:
            self._doubtful = iter(self._tree.nodes) if self._lost_again else None
            self._lost_again = False

    def take_up(self, saved: Iterable[NodeState]) -> None:
        """Watch again what was watched, and tell what is not as the guest was told before it slept."""
        for state in saved:
            if state.absent is not None:
                self._watch_again(self._tree.nodes[state.id], state.absent)
        for node in self._tree.nodes:
            try:
                attr = self._tree.stat(node)
            except OSError:
                for directory, name in node.places:
                    self._tell(Change(directory.id, name))
                self._doubt(node)
            else:
                if node.told != (attr.st_ctime_ns, attr.st_size):
                    self._doubt(node)

    def _tell_left(self) -> None:
        left = self._tree.nodes.left
        while left:
            self._tell(Change(*left.pop()))

    def _watch_again(self, directory: HostNode, absent: list[bytes]) -> None:
        with suppress(OSError):  # it is not there, and will be told so
            self.watch(directory)
        watched = directory.watched
        if watched is None:
            for name in absent:
                self._tell(Change(directory.id, name))
        else:
            watched.absent.update(absent)
            watched.listed = True
            self._absent += len(absent)

    def _doubt(self, node: HostNode) -> None:
        node.told = None
        self._tell(Change(node.id))
        watched = node.watched
        if watched is not None:
            for name in watched.absent:
                self._tell(Change(node.id, name))
            self._absent -= len(watched.absent)
            watched.absent.clear()
            watched.listed = False

    def _take(self, event: Event) -> None:
        if event.mask & inotify.OVERFLOW:
            self._doubt_everything()
            return
        directory = self._by_wd.get(event.wd)
        if directory is None:
            return
        if event.mask & inotify.IGNORED:
            self._lost(directory)
            return
        key = (event.wd, event.name, event.mask & ~inotify.IS_DIRECTORY)
        ours = self._expected[key] > 0
        if ours and event.mask & _COUNTED:
            self._expected[key] -= 1
        if event.mask & inotify.NAMES:
            if not ours:
                self._name_changed(directory, event)
        elif not event.name:
            if self._counts(directory, event, ours=ours):
                directory.told = None
                self._told[Change(directory.id)] = None
        else:
            self._content_changed(directory, event, ours=ours)

    def _name_changed(self, directory: HostNode, event: Event) -> None:
        watched = directory.watched
        if watched is None:
            return
        known = directory.children.get(event.name)
        if event.name in watched.absent or known is not None:
            self._told[Change(directory.id, event.name)] = None
        if known is not None and known.kind == stat.S_IFREG:
            # Somebody may have it open, and no event tells of it until it is found again.
            known.astray = True
            if known.told is not None:
                known.told = None
                self._told[Change(known.id)] = None
        self.present(directory, event.name)
        if directory.told is not None or watched.listed:  # its times, and a listing that was kept
            directory.told = None
            watched.listed = False
            self._told[Change(directory.id)] = None

    def _content_changed(self, directory: HostNode, event: Event, *, ours: bool) -> None:
        node = directory.children.get(event.name)
        if node is None or not self._counts(node, event, ours=ours):
            return
        self._told[Change(node.id)] = None
        if time.time_ns() - node.told_ns < YOUNG_NS:
            self._told[Change(directory.id, event.name)] = None
        node.told = None

    def _counts(self, node: HostNode, event: Event, *, ours: bool) -> bool:
        if node.told is None:
            return False
        if event.mask & inotify.CLOSE_WRITE and not ours:
            return True
        if node.told == UNTOLD:
            return not ours
        try:
            attr = self._tree.stat(node)
        except OSError:
            return False  # not there any more: an event for its name follows
        if node.told != (attr.st_ctime_ns, attr.st_size):
            return True
        return not ours and node.told_ns - attr.st_ctime_ns < TICK_NS

    def _lost(self, directory: HostNode) -> None:
        # Removed, or its file system is unmounted. What is in it is as doubtful as it is.
        for name in list(directory.children):
            self._told[Change(directory.id, name)] = None
        self._doubt(directory)
        self.forget(directory)


def _budget() -> int:
    try:
        return int(_WATCHES_FILE.read_text()) // 16
    except (OSError, ValueError):
        return 512
