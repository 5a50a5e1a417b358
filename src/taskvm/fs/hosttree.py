"""How the nodes of a HostDir are reached: from the root's descriptor, never out of it. No policy and no bookkeeping.

Rule 1: every path is walked by openat2 from the root's descriptor, beneath it, across no symbolic link and no mount
    point; the last step of an operation names one component in a directory that was reached so.
Rule 2: a descriptor of a directory is used for at most WALK_AGE_S after its path was walked, and one of a file after
    it was seen to be inside, so what the host moves out of the tree is out of reach a second later.
Rule 3: what is opened by name is opened as itself (O_PATH), which does nothing to it, and compared with the node. Only
    a regular file is then opened for its contents, through that descriptor: a FIFO or a device that was put in its
    place never sees an open.
Rule 4: a descriptor that a method returns is valid until the next call; the sets that hold them are bounded.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from taskvm.fs import syscalls
from taskvm.fs.descriptors import DescriptorSet, Held, Pins
from taskvm.fs.listings import Listings, Raw
from taskvm.fs.nodes import HostNode, NodeTable, identity
from taskvm.fs.provider import Node, refuse
from taskvm.fs.syscalls import HostAttr

WALK_AGE_S = 1.0
WRITE_AGE_S = 1.0
# Far deeper than PATH_MAX allows; ends the walk when the host has moved directories into a circle of stale places.
MAX_DEPTH = 4096
CONTENT = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
NODE = os.O_PATH | os.O_NOFOLLOW

_SET_ID = stat.S_ISUID | stat.S_ISGID
_OWNER = stat.S_IRUSR | stat.S_IWUSR
_T = TypeVar("_T")
# linux/magic.h. The birth of a file there is that of the layer it is in, and changes when it is copied up.
_OVERLAYFS = 0x794C7630


class HostTree:
    """What is beneath the directory `root`, a descriptor that this object takes over."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.filesystem = syscalls.filesystem_type(root)
        self._has_births = self.filesystem != _OVERLAYFS
        self.nodes = NodeTable(self.stat_fd(root))
        self.closed: Callable[[Node], None] = _nobody  # is told of what was open for writing
        self._contents = DescriptorSet()
        self._directories = DescriptorSet()
        # Unlinked files that the guest still uses. O_PATH: opened for reading or writing through /proc when needed.
        self._pins = Pins()
        self._listings = Listings()
        held = (self._contents, self._directories, self._pins, self._listings)
        self._release = weakref.finalize(self, _close, root, held)

    def close(self) -> None:
        """Close every descriptor. Idempotent."""
        self._release()
        self.root = -1

    def forget(self, node: HostNode) -> None:
        """Let go of what is open for a node."""
        self._drop_content(node.id)
        self._directories.drop(node.id)
        self._pins.drop(node.id)
        self._listings.forget(node.id)

    # Directories.

    def walk(self, directory: HostNode) -> int:
        """Return a descriptor of `directory`, reached from the root a moment ago."""
        root = self.nodes.root
        if directory is root:
            return self.root
        now = time.monotonic()
        steps: list[HostNode] = []
        fd, until = self.root, now + WALK_AGE_S
        step = directory
        while step is not root:
            held = self._directories.get(step.id)
            if held is not None and held.until > now:
                fd, until = held.fd, held.until
                break
            if not step.places or len(steps) >= MAX_DEPTH:
                raise refuse(errno.ESTALE)
            steps.append(step)
            step = step.places[-1][0]
        for step in reversed(steps):
            fd = self._open_node(fd, step, step.places[-1][1], os.O_PATH | os.O_DIRECTORY)
            self._directories.put(step.id, Held(fd, until=until))
        return fd

    @contextmanager
    def walk_two(self, first: HostNode, second: HostNode) -> Iterator[tuple[int, int]]:
        """Yield descriptors of two directories. The second walk could close the first one's: hence the copy."""
        if first is second:
            fd = self.walk(first)
            yield fd, fd
            return
        copy = os.dup(self.walk(first))
        try:
            yield copy, self.walk(second)
        finally:
            os.close(copy)

    def list(self, directory: HostNode, offset: int, size: int) -> list[Raw]:
        """Return entries of a directory after `offset`; it may have been moved out since the last ones."""
        return self._listings.read(directory.id, self.walk(directory), offset, size)

    def open_directory(self, directory: HostNode) -> int:
        """Return a new descriptor to sync a directory with; the ones that are walked from are O_PATH."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        return os.open(b".", flags, dir_fd=self.walk(directory))

    # Attributes.

    def stat_name(self, directory: HostNode, name: bytes) -> HostAttr:
        """Return the attributes of what `name` stands for."""
        return self._told(syscalls.stat_at(self.walk(directory), name))

    def stat_fd(self, fd: int) -> HostAttr:
        """Return the attributes of what `fd` refers to."""
        return self._told(syscalls.stat_fd(fd))

    def stat(self, node: HostNode) -> HostAttr:
        """Return the attributes of a node; ESTALE when it is not where it was seen."""
        held = self._held_content(node) or self._pinned(node)
        if held is not None:
            return self.stat_fd(held.fd)
        if node.kind == stat.S_IFDIR:
            return self.stat_fd(self.walk(node))
        return self._at_its_place(node, lambda parent, name: self._stat_at(node, parent, name))

    def _stat_at(self, node: HostNode, parent: HostNode, name: bytes) -> HostAttr:
        try:
            attr = self.stat_name(parent, name)
        except FileNotFoundError:
            raise refuse(errno.ESTALE) from None
        if identity(attr) != node.identity:
            raise refuse(errno.ESTALE)
        return attr

    def _at_its_place(self, node: HostNode, use: Callable[[HostNode, bytes], _T]) -> _T:
        """Return what `use` makes of a name of `node`; it says ESTALE of one that stands for something else.

        Such a name is dropped if there are others. The last one stays: the host may move things to and fro.
        """
        while node.places:
            parent, name = node.places[-1]
            try:
                used = use(parent, name)
            except OSError as error:
                if error.errno != errno.ESTALE or len(node.places) == 1:
                    raise
                self.nodes.leave(parent, name)
            else:
                node.astray = False
                return used
        raise refuse(errno.ESTALE)

    def exists(self, directory: HostNode, name: bytes) -> bool:
        """Tell whether `name` stands for anything."""
        try:
            self.stat_name(directory, name)
        except FileNotFoundError:
            return False
        return True

    def _told(self, attr: HostAttr) -> HostAttr:
        return attr if self._has_births else attr.without_birth()

    @contextmanager
    def handle(self, node: HostNode) -> Iterator[int]:
        """Yield a descriptor of the node of whatever type, good for its attributes (it may be O_PATH)."""
        held = self._held_content(node) or self._pinned(node)
        if held is not None:
            yield held.fd
        elif node.kind == stat.S_IFDIR:
            yield self.walk(node)
        else:
            fd = self._at_its_place(
                node, lambda parent, name: self._open_node(self.walk(parent), node, name, NODE)
            )
            try:
                yield fd
            finally:
                os.close(fd)

    # Contents.

    def content(self, node: HostNode, *, write: bool) -> int:
        """Return a descriptor to read from or write to."""
        held = self._held_content(node)
        if held is None or not (held.writable if write else held.readable):
            if node.kind != stat.S_IFREG:
                raise refuse(errno.EISDIR if node.kind == stat.S_IFDIR else errno.EINVAL)
            held = self._open_writable(node) if write else self._open_content(node, os.O_RDONLY)
            self._keep(node, held)
        if write:
            held.written = time.monotonic()
        return held.fd

    def any_content(self, node: HostNode) -> int:
        """Return a descriptor of the contents, such as lseek(2) needs."""
        held = self._held_content(node)
        return held.fd if held is not None else self.content(node, write=False)

    def syncable(self, node: HostNode) -> int:
        """Return a descriptor for fsync(2), which one that can only be written to is as good for."""
        try:
            return self.any_content(node)
        except PermissionError:
            return self.content(node, write=True)

    def keep_rights(self, node: HostNode, mode: int) -> None:
        """Open a file that with `mode` cannot be opened again: who has it open in the guest goes on, as everywhere."""
        if node.kind != stat.S_IFREG or not self.stat(node).st_mode & ~mode & _OWNER:
            return
        for write in (True, False):
            with suppress(OSError):
                self.content(node, write=write)
                return

    def keep_created(self, node: HostNode, fd: int) -> None:
        """Keep the descriptor of a file that was just created, which its mode may not allow to be opened again."""
        now = time.monotonic()
        self._keep(node, Held(fd, True, True, until=now + WALK_AGE_S, written=now))

    def rest(self) -> None:
        """Close directories that are too old to be used, and what was written a while ago and can be opened again.

        The host cannot run a program that is open for writing (ETXTBSY), wherever it has moved that.
        """
        now = time.monotonic()
        for number, held in self._directories.items():
            if held.until <= now:
                self._directories.drop(number)
        for number, held in self._contents.items():
            if not held.writable or now - held.written < WRITE_AGE_S:
                continue
            if not os.access(through_proc(held.fd), os.W_OK, effective_ids=True):
                continue
            if os.fstat(held.fd).st_mode & stat.S_IXUSR or self._can_be_found(number):
                self._drop_content(number)

    def _can_be_found(self, number: Node) -> bool:
        node = self.nodes.get(number)
        if node is None or self._pins.get(number) is not None:
            return True
        with suppress(OSError):
            self._at_its_place(node, lambda parent, name: self._stat_at(node, parent, name))
            return True
        return False

    def pin(self, parent: HostNode, name: bytes) -> None:
        """Keep what is about to lose its name `name`, if the guest has it and knows no other name that it has."""
        node = parent.children.get(name)
        if node is None or node.kind not in (stat.S_IFREG, stat.S_IFDIR):
            return
        if len(node.places) > 1 and self._has_other_name(node, parent, name):
            return
        try:
            fd = self._open_node(self.walk(parent), node, name, NODE)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise refuse(errno.ENFILE) from None  # better to refuse than to lose what is open
            return  # the host was faster: what is there by now is not what the guest has
        self._pins.put(node.id, Held(fd))

    def _has_other_name(self, node: HostNode, parent: HostNode, name: bytes) -> bool:
        for place in [one for one in reversed(node.places) if one != (parent, name)]:
            with suppress(OSError):
                self._stat_at(node, *place)
                return True
            self.nodes.leave(*place)
        return False

    def _keep(self, node: HostNode, opened: Held) -> None:
        for number, held in self._contents.put(node.id, opened):
            if held.writable:
                self.closed(number)

    def _drop_content(self, number: Node) -> None:
        held = self._contents.drop(number)
        if held is not None and held.writable:
            self.closed(number)

    def _held_content(self, node: HostNode) -> Held | None:
        """Return the descriptor that is kept for a file, unless the host has moved the file out."""
        held = self._contents.get(node.id)
        if held is None:
            return None
        now = time.monotonic()
        if held.until <= now:
            if not self._is_inside(node, held.fd):
                self._drop_content(node.id)
                return None
            held.until = now + WALK_AGE_S
        return held

    def _pinned(self, node: HostNode) -> Held | None:
        """Return the pin of a file or directory, unless it kept its name after all and the host has moved it out."""
        pin = self._pins.get(node.id)
        if pin is not None and not self._is_inside(node, pin.fd):
            self._pins.drop(node.id)
            return None
        return pin

    def _is_inside(self, node: HostNode, fd: int) -> bool:
        # The kernel tells the place a descriptor has now, and for an unlinked file the one it had.
        try:
            root, place = (os.readlink(through_proc(one)) for one in (self.root, fd))  # noqa: PTH115
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return self._is_where_it_was(node, fd)
        return place.startswith(root.rstrip("/") + "/")

    def _is_where_it_was(self, node: HostNode, fd: int) -> bool:
        """Tell whether a descriptor is of what can be reached from the root, where its path is too long to be told."""
        if not os.fstat(fd).st_nlink:
            return True  # nobody can have moved it out
        try:
            if node.kind == stat.S_IFDIR:
                self.walk(node)
            else:
                self._at_its_place(node, lambda parent, name: self._stat_at(node, parent, name))
        except OSError:
            return False
        return True

    def _open_writable(self, node: HostNode) -> Held:
        try:
            opened = self._open_content(node, os.O_RDWR)
        except PermissionError:
            opened = self._open_content(node, os.O_WRONLY)
        mode = os.fstat(opened.fd).st_mode
        if mode & _SET_ID:
            # Not the owner, so not root either: the host's kernel takes the bits away with the write.
            with suppress(PermissionError):
                os.fchmod(opened.fd, stat.S_IMODE(mode) & ~_SET_ID)
        return opened

    def _open_content(self, node: HostNode, access: int) -> Held:
        with self.handle(node) as itself:
            fd = os.open(through_proc(itself), access | (CONTENT & ~os.O_NOFOLLOW))
        until = time.monotonic() + WALK_AGE_S
        return Held(fd, access != os.O_WRONLY, access != os.O_RDONLY, until)

    def _open_node(self, directory: int, node: HostNode, name: bytes, flags: int) -> int:
        """Open `name`; ESTALE unless it is `node`."""
        try:
            fd = syscalls.open_beneath(directory, name, flags)
        except OSError as error:
            # Gone, or a symbolic link or something else by now: in each case no longer this node.
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                raise refuse(errno.ESTALE) from None
            raise
        if identity(self.stat_fd(fd)) != node.identity:
            os.close(fd)
            raise refuse(errno.ESTALE)
        return fd


def _nobody(number: Node) -> None:
    """Nobody asked to be told."""


def _close(root: int, sets: Iterable[DescriptorSet | Listings]) -> None:
    for held in sets:
        held.close()
    os.close(root)


def through_proc(fd: int) -> str:
    """Return a path that leads to what `fd` refers to, an O_PATH descriptor too, and to nothing else."""
    return f"/proc/self/fd/{fd}"
