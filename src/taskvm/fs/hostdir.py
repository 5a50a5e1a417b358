"""A directory of the host as a provider. The guest sees what is in it and reaches nothing else.

Rule 1: every path is walked by openat2 from the root's descriptor, beneath it, across no symbolic link and no mount
    point; the last step of an operation names one component in a directory that was reached so.
Rule 2: a descriptor of a directory is used for at most WALK_AGE_S after its path was walked, and one of a file after
    it was seen to be inside, so what the host moves out of the tree is out of reach a second later.
Rule 3: only regular files are opened for their contents, without blocking. What was opened is compared with the node
    before it is used; there is no check before an open.
Rule 4: nothing here makes a device, or a set-user-id or set-group-id file; what has such a bit loses it when it is
    opened for writing.
Rule 5: the kernel of the guest opens files by itself, so no reply names a descriptor. A node's descriptor lives in a
    bounded set; a file that was created keeps its writable one, which its mode may not allow to be opened again.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from taskvm.errors import UsageError
from taskvm.fs import syscalls
from taskvm.fs.descriptors import DescriptorSet, Held, descriptor_budget
from taskvm.fs.nodes import HostNode, NodeTable, identity
from taskvm.fs.provider import DirEntry, Entry, Node, Provider, refuse
from taskvm.fs.specials import END_OFFSET, FIRST_OFFSET, Special, Specials
from taskvm.fs.specials import KINDS as SPECIAL_KINDS
from taskvm.wire.fuse import SetAttr, SetAttrField
from taskvm.wire.fuse_replies import Lifetime, StatFs

WALK_AGE_S = 1.0
# The host may change a file at any time and nothing tells us yet: what it did shows after a second.
LIFETIME = Lifetime(entry_ns=1_000_000_000, attr_ns=1_000_000_000)
# Far deeper than PATH_MAX allows; ends the walk when the host has moved directories into a circle of stale places.
MAX_DEPTH = 4096
# One COPY_FILE_RANGE occupies the server's thread; the guest asks again for the rest.
COPY_CHUNK = 16 * 1024 * 1024

_MODE = 0o1777  # what a guest may set: rule 4
_SET_ID = stat.S_ISUID | stat.S_ISGID
_OPEN_NODE = os.O_PATH | os.O_NOFOLLOW
_OPEN_CONTENT = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
_TRANSPARENT_XATTRS = b"user."


class HostDir(Provider):
    """Serves the directory `path`, which must exist; `mode` "ro" refuses every change."""

    def __init__(
        self, path: str | os.PathLike[str], *, mode: Literal["direct", "ro"] = "direct"
    ) -> None:
        if mode not in ("direct", "ro"):
            raise UsageError(
                f"serve the directory {os.fspath(path)}",
                f"mode {mode!r} does not exist",
                "Use direct or ro",
            )
        resolved = _resolve(path)
        root = os.open(resolved, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._begin(resolved, mode == "ro", root)

    def _begin(self, path: Path, readonly: bool, root: int) -> None:
        self.path = path
        self.readonly = readonly
        self._root = root
        self._release_root = weakref.finalize(self, os.close, root)
        self._nodes = NodeTable(os.fstat(root))
        budget = descriptor_budget()
        self._contents = DescriptorSet(budget)
        self._directories = DescriptorSet(budget)
        # Unlinked files that the guest still uses. O_PATH: opened for reading or writing through /proc when needed.
        self._pins = DescriptorSet(budget)
        self._specials = Specials()
        self._umask = _umask()

    def __repr__(self) -> str:
        return f"HostDir({str(self.path)!r}, mode={'ro' if self.readonly else 'direct'!r})"

    def opened(self) -> HostDir:
        # The same directory, not what is at its path by now: another mount's guest may have replaced that.
        served = HostDir.__new__(HostDir)
        served._begin(self.path, self.readonly, os.dup(self._root))
        served.xattrs = self.xattrs
        return served

    def close(self) -> None:
        for held in (self._contents, self._directories, self._pins):
            held.close()
        self._release_root()
        self._root = -1

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        directory = self._nodes[parent]
        attr: os.stat_result | Special
        try:
            attr = os.stat(name, dir_fd=self._walk(directory), follow_symlinks=False)
        except FileNotFoundError:
            special = self._specials.get(directory.identity, name)
            if special is None:
                self._nodes.unbind(directory, name)
                raise
            attr = special
        return Entry(self._nodes.bind(directory, name, attr).id, attr, LIFETIME)

    def forget(self, node: Node, count: int) -> None:
        gone = self._nodes.forget(node, count)
        if gone is not None:
            self._contents.drop(node)
            self._directories.drop(node)
            self._pins.drop(node)
            self._specials.forget(gone.identity)

    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        directory = self._nodes[node]
        if FIRST_OFFSET <= offset < END_OFFSET:
            return self._specials.list(directory.identity, offset)
        with self._reading(directory) as fd:
            entries = syscalls.read_directory(fd, offset, size)
        if not entries:
            return self._specials.list(directory.identity, FIRST_OFFSET)
        if directory is self._nodes.root:  # what is above the root is nobody's business
            own = directory.identity[1]
            return [DirEntry(e[0], own if e[0] == b".." else e[1], e[2], e[3]) for e in entries]
        return [DirEntry(name, ino, kind, following) for name, ino, kind, following in entries]

    def readlink(self, node: Node) -> bytes:
        link = self._nodes[node]
        if link.kind != stat.S_IFLNK:
            raise refuse(errno.EINVAL)
        with self._handle(link) as fd:
            return os.readlink(b"", dir_fd=fd)

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        directory = self._for_change(parent)
        how = os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_CONTENT
        try:
            fd = os.open(name, how, mode & _MODE, dir_fd=self._walk(directory))
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            return self._create_existing(parent, name, flags)
        try:
            self._undo_umask(fd, mode)
            attr = os.fstat(fd)
            node = self._nodes.bind(directory, name, attr)
        except OSError:
            os.close(fd)
            raise
        self._contents.put(node.id, Held(fd, True, True, time.monotonic() + WALK_AGE_S))
        return Entry(node.id, attr, LIFETIME)

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        kind = stat.S_IFMT(mode)
        if kind in (0, stat.S_IFREG):
            return self.create(parent, name, mode, os.O_EXCL)
        if kind not in SPECIAL_KINDS:
            raise refuse(errno.EPERM)
        directory = self._for_change(parent)
        if self._exists(directory, name) or self._specials.get(directory.identity, name):
            raise refuse(errno.EEXIST)
        special = self._specials.make(directory.identity, name, kind | (mode & _MODE))
        return Entry(self._nodes.bind(directory, name, special).id, special, LIFETIME)

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        directory = self._for_change(parent)
        os.mkdir(name, mode & _MODE, dir_fd=self._walk(directory))
        if mode & self._umask:
            fd = syscalls.open_beneath(self._walk(directory), name, _OPEN_NODE)
            try:
                self._undo_umask(fd, mode)
            finally:
                os.close(fd)
        return self.lookup(parent, name)

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        directory = self._for_change(parent)
        os.symlink(target, name, dir_fd=self._walk(directory))
        return self.lookup(parent, name)

    def link(self, node: Node, parent: Node, name: bytes) -> Entry:
        target, directory = self._nodes[node], self._for_change(parent)
        with self._two(self._parent_of(target), directory) as (source, destination):
            old_name = target.places[-1][1]
            os.link(
                old_name, name, src_dir_fd=source, dst_dir_fd=destination, follow_symlinks=False
            )
        return self.lookup(parent, name)

    def unlink(self, parent: Node, name: bytes) -> None:
        directory = self._for_change(parent)
        self._pin(directory, name)
        try:
            os.unlink(name, dir_fd=self._walk(directory))
        except FileNotFoundError:
            if not self._specials.remove(directory.identity, name):
                raise
        self._nodes.unbind(directory, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        directory = self._for_change(parent)
        child = directory.children.get(name)
        if child is not None and self._specials.within(child.identity):
            raise refuse(errno.ENOTEMPTY)
        self._pin(directory, name)
        os.rmdir(name, dir_fd=self._walk(directory))
        self._nodes.unbind(directory, name)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        if flags & ~(syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE):
            raise refuse(errno.EINVAL)
        old, new = self._for_change(parent), self._for_change(new_parent)
        if self._specials.get(old.identity, name) and not self._exists(old, name):
            self._rename_special(old, name, new, new_name, flags)
            return
        if flags & syscalls.RENAME_NOREPLACE and self._specials.get(new.identity, new_name):
            raise refuse(errno.EEXIST)
        if not flags:
            if new.children.get(new_name) is old.children.get(name) is not None:
                return  # two names of one inode: rename(2) does nothing
            self._pin(new, new_name)
        with self._two(old, new) as (source, destination):
            syscalls.rename(source, name, destination, new_name, flags)
        if flags & syscalls.RENAME_EXCHANGE:
            self._nodes.exchange(old, name, new, new_name)
        else:
            self._specials.remove(new.identity, new_name)
            self._nodes.move(old, name, new, new_name)

    # Attributes.

    def getattr(self, node: Node) -> tuple[os.stat_result | Special, Lifetime]:
        return self._stat(self._nodes[node]), LIFETIME

    def setattr(self, node: Node, changes: SetAttr) -> tuple[os.stat_result | Special, Lifetime]:
        target, valid = self._for_change(node), changes.valid
        self._refuse_chown(target, changes)
        special = self._specials.known(target.identity)
        if special is not None:
            special.change(changes, _MODE)
            return special, LIFETIME
        if valid & SetAttrField.SIZE:
            os.ftruncate(self._content(target, write=True), changes.size)
        with self._handle(target) as fd:
            if valid & SetAttrField.MODE:
                os.chmod(_through_proc(fd), changes.mode & _MODE)  # noqa: PTH101 - a descriptor
            atime = _time(valid, SetAttrField.ATIME, SetAttrField.ATIME_NOW, changes.atime_ns)
            mtime = _time(valid, SetAttrField.MTIME, SetAttrField.MTIME_NOW, changes.mtime_ns)
            if (atime, mtime) != (syscalls.OMIT, syscalls.OMIT):
                syscalls.set_times(fd, atime, mtime)
            attr = os.fstat(fd)
        if identity(attr) != target.identity:
            self._nodes.reidentify(target, attr)
        return attr, LIFETIME

    def statfs(self, node: Node) -> StatFs:
        stat_fs = os.fstatvfs(self._root)
        return StatFs(
            blocks=stat_fs.f_blocks,
            free=stat_fs.f_bfree,
            available=stat_fs.f_bavail,
            files=stat_fs.f_files,
            files_free=stat_fs.f_ffree,
            block_size=stat_fs.f_bsize,
            fragment_size=stat_fs.f_frsize,
            max_name=stat_fs.f_namemax,
        )

    def getxattr(self, node: Node, name: bytes) -> bytes:
        with self._xattr_path(node, name) as path:
            return os.getxattr(path, name)

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        self._for_change(node)
        with self._xattr_path(node, name) as path:
            os.setxattr(path, name, value, flags)

    def listxattr(self, node: Node) -> list[bytes]:
        with self._xattr_path(node, _TRANSPARENT_XATTRS) as path:
            names = [os.fsencode(name) for name in os.listxattr(path)]
        return [name for name in names if name.startswith(_TRANSPARENT_XATTRS)]

    def removexattr(self, node: Node, name: bytes) -> None:
        self._for_change(node)
        with self._xattr_path(node, name) as path:
            os.removexattr(path, name)

    # Contents.

    def read(self, node: Node, offset: int, size: int) -> bytes:
        return os.pread(self._content(self._nodes[node], write=False), size, offset)

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        fd = self._content(self._for_change(node), write=True)
        if append:
            return os.pwritev(fd, [data], offset, os.RWF_APPEND)
        return os.pwrite(fd, data, offset)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        target = self._nodes[node]
        if target.kind == stat.S_IFDIR:
            fd = os.open(
                b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._walk(target)
            )
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        else:
            sync = os.fdatasync if data_only else os.fsync
            sync(self._any_content(target))

    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        syscalls.allocate(self._content(self._for_change(node), write=True), mode, offset, length)

    def seek(self, node: Node, offset: int, whence: int) -> int:
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise refuse(errno.EINVAL)
        return os.lseek(self._content(self._nodes[node], write=False), offset, whence)

    def copy_range(
        self, node: Node, offset: int, target: Node, target_offset: int, length: int
    ) -> int:
        # Duplicated, because opening the target may close what the set held for the source.
        source = os.dup(self._content(self._nodes[node], write=False))
        try:
            destination = self._content(self._for_change(target), write=True)
            return os.copy_file_range(
                source, destination, min(length, COPY_CHUNK), offset, target_offset
            )
        finally:
            os.close(source)

    # Reaching nodes.

    def _for_change(self, node: Node) -> HostNode:
        if self.readonly:
            raise refuse(errno.EROFS)
        return self._nodes[node]

    def _walk(self, directory: HostNode) -> int:
        """Return a descriptor of `directory`, reached from the root a moment ago; valid until the next call."""
        if directory is self._nodes.root:
            return self._root
        now = time.monotonic()
        steps: list[HostNode] = []
        fd, until = self._root, now + WALK_AGE_S
        step = directory
        while step is not self._nodes.root:
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

    def _parent_of(self, node: HostNode) -> HostNode:
        if not node.places:
            raise refuse(errno.ESTALE)
        return node.places[-1][0]

    @contextmanager
    def _two(self, first: HostNode, second: HostNode) -> Iterator[tuple[int, int]]:
        """Yield descriptors of two directories. The second walk could close the first one's: hence the copy."""
        if first is second:
            fd = self._walk(first)
            yield fd, fd
            return
        copy = os.dup(self._walk(first))
        try:
            yield copy, self._walk(second)
        finally:
            os.close(copy)

    @contextmanager
    def _reading(self, directory: HostNode) -> Iterator[int]:
        """Yield a descriptor to list or sync a directory with; the ones that are walked from are O_PATH."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(b".", flags, dir_fd=self._walk(directory))
        try:
            yield fd
        finally:
            os.close(fd)

    def _exists(self, directory: HostNode, name: bytes) -> bool:
        try:
            os.stat(name, dir_fd=self._walk(directory), follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _open_node(self, directory: int, node: HostNode, name: bytes, flags: int) -> int:
        """Open `name`; ESTALE unless it is `node`."""
        try:
            fd = syscalls.open_beneath(directory, name, flags)
        except OSError as error:
            # Gone, or a symbolic link or something else by now: in each case no longer this node.
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                raise refuse(errno.ESTALE) from None
            raise
        if identity(os.fstat(fd)) != node.identity:
            os.close(fd)
            raise refuse(errno.ESTALE)
        return fd

    def _stat(self, node: HostNode) -> os.stat_result | Special:
        held = self._held_content(node) or self._pins.get(node.id)
        if held is not None:
            return os.fstat(held.fd)
        if node.kind == stat.S_IFDIR:
            return os.fstat(self._walk(node))
        special = self._specials.known(node.identity)
        if special is not None:
            return special
        parent = self._walk(self._parent_of(node))
        try:
            attr = os.stat(node.places[-1][1], dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            raise refuse(errno.ESTALE) from None
        if identity(attr) != node.identity:
            raise refuse(errno.ESTALE)
        return attr

    @contextmanager
    def _handle(self, node: HostNode) -> Iterator[int]:
        """Yield a descriptor of the node of whatever type, good for its attributes (it may be O_PATH)."""
        held = self._held_content(node) or self._pins.get(node.id)
        if held is not None:
            yield held.fd
        elif node.kind == stat.S_IFDIR:
            yield self._walk(node)
        else:
            parent = self._walk(self._parent_of(node))
            fd = self._open_node(parent, node, node.places[-1][1], _OPEN_NODE)
            try:
                yield fd
            finally:
                os.close(fd)

    @contextmanager
    def _xattr_path(self, node: Node, name: bytes) -> Iterator[str]:
        """Yield a path for the xattr calls; only regular files and directories may have `user.` attributes."""
        target = self._nodes[node]
        if not name.startswith(_TRANSPARENT_XATTRS):
            raise refuse(errno.EOPNOTSUPP)
        if target.kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise refuse(errno.EOPNOTSUPP)
        with self._handle(target) as fd:
            yield _through_proc(fd)

    # Contents and what is kept of them.

    def _content(self, node: HostNode, *, write: bool) -> int:
        """Return a descriptor to read from or write to; valid until the next call."""
        held = self._held_content(node)
        if held is not None and (held.writable if write else held.readable):
            return held.fd
        if node.kind != stat.S_IFREG:
            raise refuse(errno.EISDIR if node.kind == stat.S_IFDIR else errno.EINVAL)
        opened = self._open_writable(node) if write else self._open_content(node, os.O_RDONLY)
        self._contents.put(node.id, opened)
        return opened.fd

    def _held_content(self, node: HostNode) -> Held | None:
        """Return the descriptor that is kept for a file, unless the host has moved the file out."""
        held = self._contents.get(node.id)
        if held is None:
            return None
        now = time.monotonic()
        if held.until <= now:
            if not self._is_inside(held.fd):
                self._contents.drop(node.id)
                return None
            self._contents.renew(node.id, now + WALK_AGE_S)
        return held

    def _is_inside(self, fd: int) -> bool:
        # The kernel tells the place a descriptor has now, and for an unlinked file the one it had.
        root, place = (os.readlink(_through_proc(one)) for one in (self._root, fd))  # noqa: PTH115
        return place.startswith(root.rstrip("/") + "/")

    def _any_content(self, node: HostNode) -> int:
        held = self._held_content(node)
        return held.fd if held is not None else self._content(node, write=False)

    def _open_writable(self, node: HostNode) -> Held:
        if self.readonly:
            raise refuse(errno.EROFS)
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
        pin = self._pins.get(node.id)
        if pin is not None:
            fd = os.open(_through_proc(pin.fd), access | (_OPEN_CONTENT & ~os.O_NOFOLLOW))
        else:
            parent = self._walk(self._parent_of(node))
            fd = self._open_node(parent, node, node.places[-1][1], access | _OPEN_CONTENT)
        until = time.monotonic() + WALK_AGE_S
        return Held(fd, access != os.O_WRONLY, access != os.O_RDONLY, until)

    def _pin(self, parent: HostNode, name: bytes) -> None:
        """Keep what is about to lose its name `name`, if the guest has it and knows no other name of it."""
        node = parent.children.get(name)
        if node is None or len(node.places) > 1 or node.kind not in (stat.S_IFREG, stat.S_IFDIR):
            return
        try:
            fd = self._open_node(self._walk(parent), node, name, _OPEN_NODE)
        except OSError:
            return  # the host was faster: what is there by now is not what the guest has
        self._pins.put(node.id, Held(fd))

    def _create_existing(self, parent: Node, name: bytes, flags: int) -> Entry:
        """Answer a create that lost against another: the file is there, and is opened instead."""
        entry = self.lookup(parent, name)
        node = self._nodes[entry.node]
        try:
            if node.kind != stat.S_IFREG:
                raise refuse(
                    errno.ESTALE
                )  # the guest's kernel looks the name up again, and then knows better
            if not flags & os.O_TRUNC:
                return entry
            os.ftruncate(self._content(node, write=True), 0)
            return Entry(entry.node, self._stat(node), LIFETIME)
        except OSError:
            self.forget(entry.node, 1)
            raise

    def _rename_special(
        self, old: HostNode, name: bytes, new: HostNode, new_name: bytes, flags: int
    ) -> None:
        if flags & syscalls.RENAME_EXCHANGE:
            raise refuse(errno.EINVAL)
        if (old, name) == (new, new_name):
            return
        if self._exists(new, new_name) or self._specials.get(new.identity, new_name):
            if flags & syscalls.RENAME_NOREPLACE:
                raise refuse(errno.EEXIST)
            self.unlink(new.id, new_name)
        self._specials.move(old.identity, name, new.identity, new_name)
        self._nodes.move(old, name, new, new_name)

    def _undo_umask(self, fd: int, mode: int) -> None:
        """Give a new file the mode that the guest's umask left, which ours must not narrow again."""
        asked = mode & _MODE
        has = stat.S_IMODE(os.fstat(fd).st_mode)
        # Anything else than the umask (a default ACL) is the host's wish and stays.
        if has & _MODE == asked & ~self._umask != asked:
            os.chmod(_through_proc(fd), asked | (has & stat.S_ISGID))  # noqa: PTH101 - a descriptor

    def _refuse_chown(self, node: HostNode, changes: SetAttr) -> None:
        if not changes.valid & (SetAttrField.UID | SetAttrField.GID):
            return
        attr = self._stat(node)
        if changes.valid & SetAttrField.UID and changes.uid != attr.st_uid:
            raise refuse(errno.EPERM)
        if changes.valid & SetAttrField.GID and changes.gid != attr.st_gid:
            raise refuse(errno.EPERM)


def _resolve(path: str | os.PathLike[str]) -> Path:
    operation = f"serve the directory {os.fspath(path)}"
    try:
        resolved = Path(path).resolve(strict=True)
    except OSError as error:
        raise UsageError(operation, error.strerror or str(error), "Create it first") from error
    if not resolved.is_dir():
        raise UsageError(operation, "it is not a directory", "Name the directory it is in")
    return resolved


def _umask() -> int:
    # os.umask() can only be asked by setting it, for all threads: /proc tells without (Linux 4.7).
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o077


def _through_proc(fd: int) -> str:
    """Return a path that leads to what `fd` refers to, an O_PATH descriptor too, and to nothing else."""
    return f"/proc/self/fd/{fd}"


def _time(valid: int, given: SetAttrField, now: SetAttrField, value_ns: int) -> tuple[int, int]:
    if valid & now:
        return syscalls.NOW
    if valid & given:
        return divmod(value_ns, 1_000_000_000)
    return syscalls.OMIT
