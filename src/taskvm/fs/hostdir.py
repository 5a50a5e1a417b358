"""A directory of the host as a provider. The guest sees what is in it and reaches nothing else (fs/hosttree.py).

Rule 1: nothing here makes a device, or a set-user-id or set-group-id file; what has such a bit loses it when it is
    opened for writing. FIFOs and sockets of the guest exist in this process only (fs/specials.py).
Rule 2: the kernel of the guest opens files by itself, so no reply names a descriptor. A node's descriptor lives in a
    bounded set; a file that was created keeps its writable one, which its mode may not allow to be opened again.
Rule 3: whatever the guest is told goes through fs/coherence.py, which knows how long it lasts, and so does each change
    that it makes.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import msgspec

from taskvm.errors import UsageError
from taskvm.fs import inotify, syscalls
from taskvm.fs.coherence import LOCAL, Coherence
from taskvm.fs.hostattributes import MODE, Umask, refuse_chown, set_mode_and_times
from taskvm.fs.hosttree import CONTENT, HostTree, through_proc
from taskvm.fs.lower import Lower
from taskvm.fs.nodes import UNTOLD, HostNode, Identity, NodeState, identity
from taskvm.fs.provider import Absent, DirEntry, Entry, Node, Provider, Source, refuse
from taskvm.fs.specials import END_OFFSET, FIRST_OFFSET, Special, Specials, SpecialState
from taskvm.fs.specials import KINDS as SPECIAL_KINDS
from taskvm.fs.syscalls import HostAttr
from taskvm.wire.fuse import SetAttr, SetAttrField
from taskvm.wire.fuse_replies import Lifetime, StatFs

Mode = Literal["direct", "ro", "review"]
# One COPY_FILE_RANGE occupies the server's thread; the guest asks again for the rest.
COPY_CHUNK = 16 * 1024 * 1024

_TRANSPARENT_XATTRS = b"user."


class HostDirState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a mounted directory is saved with its guest."""

    nodes: list[NodeState]
    specials: Sequence[SpecialState]


class HostDir(Provider):
    """Serves the directory `path`, which must exist; `mode` "ro" refuses every change.

    With "review" the guest changes a view of it, and `Sandbox.changes` brings what it did, to be looked at and applied.
    """

    def __init__(self, path: str | os.PathLike[str], *, mode: Mode = "direct") -> None:
        if mode not in get_args(Mode):
            raise UsageError(
                f"serve the directory {os.fspath(path)}",
                f"mode {mode!r} does not exist",
                "Use direct, ro or review",
            )
        resolved = _resolve(path)
        root = os.open(resolved, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._begin(resolved, mode, root)

    def _begin(self, path: Path, mode: Mode, root: int, *, live: bool = False) -> None:
        self.path = path
        self.mode = mode
        self.readonly = mode != "direct"
        self._tree = HostTree(root)
        self._nodes = self._tree.nodes
        self._specials = Specials()
        self._umask = Umask()
        self._coherence = Coherence(self._tree, lambda change: self.changes(change), live=live)
        self._tree.closed = self._coherence.closed
        self.lasting = self._coherence.fd is not None
        # A server that is gone would hold up all mounts.
        self.prompt = self._tree.filesystem in LOCAL

    def __repr__(self) -> str:
        return f"HostDir({str(self.path)!r}, mode={self.mode!r})"

    def opened(self) -> Provider:
        # The same directory, not what is at its path by now: another mount's guest may have replaced that.
        served = HostDir.__new__(HostDir)
        served._begin(self.path, self.mode, os.dup(self._tree.root), live=True)
        served.xattrs = self.xattrs
        return Lower(served) if self.mode == "review" else served

    def open_root(self) -> int:
        """Return a new descriptor (O_PATH) of the directory that is served, wherever it is by now."""
        return os.dup(self._tree.root)

    def close(self) -> None:
        self._coherence.close()
        self._tree.close()

    def sources(self) -> Sequence[Source]:
        fd = self._coherence.fd
        return () if fd is None else (Source(fd, self._coherence.attend),)

    def rest(self) -> None:
        self._tree.rest()

    def export_state(self) -> bytes:
        state = HostDirState(nodes=self._nodes.export(), specials=self._specials.export())
        return msgspec.msgpack.encode(state)

    def import_state(self, state: bytes) -> None:
        saved = msgspec.msgpack.decode(state, type=HostDirState)
        self._nodes.restore(saved.nodes)
        self._specials.restore(saved.specials, self._nodes.root.identity[0])
        self._coherence.take_up(saved.nodes)

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        directory = self._nodes[parent]
        self._coherence.watch(directory)
        attr: HostAttr | Special
        try:
            attr = self._tree.stat_name(directory, name)
        except FileNotFoundError:
            special = self._specials.get(directory.identity, name)
            if special is None:
                self._nodes.unbind(directory, name)
                raise Absent(self._coherence.absent(directory, name)) from None
            attr = special
        return self._entry(directory, self._nodes.bind(directory, name, attr), attr)

    def forget(self, node: Node, count: int) -> None:
        gone = self._nodes.forget(node, count)
        if gone is not None:
            self._tree.forget(gone)
            self._coherence.forget(gone)
            self._specials.forget(gone.identity)

    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        directory = self._nodes[node]
        if FIRST_OFFSET <= offset < END_OFFSET:
            return self._specials.list(directory.identity, offset)
        self._coherence.watch(directory)
        self._coherence.listed(directory)
        entries = self._tree.list(directory, offset, size)
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
        with self._tree.handle(link) as fd:
            return os.readlink(b"", dir_fd=fd)

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        directory = self._for_change(parent)
        how = os.O_RDWR | os.O_CREAT | os.O_EXCL | CONTENT
        try:
            fd = os.open(name, how, mode & MODE, dir_fd=self._tree.walk(directory))
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            return self._create_existing(parent, name, flags)
        self._coherence.names_changed(directory, name, inotify.CREATE)
        try:
            changed = self._umask.undo(fd, mode)
            attr = self._tree.stat_fd(fd)
            node = self._nodes.bind(directory, name, attr)
        except OSError:
            os.close(fd)
            raise
        self._tree.keep_created(node, fd)
        if changed:
            self._coherence.contents_changed(node, inotify.ATTRIB)
        return self._entry(directory, node, attr)

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        kind = stat.S_IFMT(mode)
        if kind in (0, stat.S_IFREG):
            return self.create(parent, name, mode, os.O_EXCL)
        if kind not in SPECIAL_KINDS:
            raise refuse(errno.EPERM)
        directory = self._for_change(parent)
        if self._tree.exists(directory, name) or self._specials.get(directory.identity, name):
            raise refuse(errno.EEXIST)
        if self._specials.is_full:
            self._specials.keep(self._is_there, lambda inode: self._nodes.known(inode) is not None)
        special = self._specials.make(directory.identity, name, kind | (mode & MODE))
        self._coherence.present(directory, name)
        return self._entry(directory, self._nodes.bind(directory, name, special), special)

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        directory = self._for_change(parent)
        os.mkdir(name, mode & MODE, dir_fd=self._tree.walk(directory))
        self._coherence.names_changed(directory, name, inotify.CREATE)
        entry = self.lookup(parent, name)
        if entry.attr.st_mode & MODE == mode & MODE:
            return entry
        node = self._nodes[entry.node]
        try:
            with self._tree.handle(node) as fd:
                if self._umask.undo(fd, mode):
                    self._coherence.contents_changed(node, inotify.ATTRIB)
            return self._entry(directory, node, self._stat(node))
        except OSError:
            self.forget(entry.node, 1)
            raise

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        directory = self._for_change(parent)
        os.symlink(target, name, dir_fd=self._tree.walk(directory))
        self._coherence.names_changed(directory, name, inotify.CREATE)
        return self.lookup(parent, name)

    def link(self, node: Node, parent: Node, name: bytes) -> Entry:
        target, directory = self._nodes[node], self._for_change(parent)
        if target.kind == stat.S_IFDIR or self._specials.known(target.identity):
            raise refuse(errno.EPERM)
        with self._tree.handle(target) as fd:
            # The inode itself, whatever has its names by now: what /proc leads to is followed (AT_SYMLINK_FOLLOW).
            to = self._tree.walk(directory)
            os.link(through_proc(fd), name, dst_dir_fd=to, follow_symlinks=True)
        self._coherence.names_changed(directory, name, inotify.CREATE)
        return self.lookup(parent, name)

    def unlink(self, parent: Node, name: bytes) -> None:
        directory = self._for_change(parent)
        self._tree.pin(directory, name)
        try:
            os.unlink(name, dir_fd=self._tree.walk(directory))
            self._coherence.names_changed(directory, name, inotify.DELETE)
        except FileNotFoundError:
            if not self._specials.remove(directory.identity, name):
                raise
        self._nodes.unbind(directory, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        directory = self._for_change(parent)
        self._refuse_specials(directory.children.get(name))
        self._tree.pin(directory, name)
        os.rmdir(name, dir_fd=self._tree.walk(directory))
        self._coherence.names_changed(directory, name, inotify.DELETE)
        self._nodes.unbind(directory, name)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        if flags & ~(syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE):
            raise refuse(errno.EINVAL)
        old, new = self._for_change(parent), self._for_change(new_parent)
        if self._specials.get(old.identity, name) and not self._tree.exists(old, name):
            self._rename_special(old, name, new, new_name, flags)
            return
        if flags & syscalls.RENAME_NOREPLACE and self._specials.get(new.identity, new_name):
            raise refuse(errno.EEXIST)
        moved, replaced = old.children.get(name), new.children.get(new_name)
        if not flags:
            if moved is not None and moved.kind == stat.S_IFDIR:
                self._refuse_specials(replaced)
            self._tree.pin(new, new_name)
        with self._tree.walk_two(old, new) as (source, destination):
            syscalls.rename(source, name, destination, new_name, flags)
        if replaced is moved is not None and not flags and self._tree.exists(old, name):
            return  # two names of one inode: rename(2) does nothing
        self._moved(old, name, new, new_name)
        if flags & syscalls.RENAME_EXCHANGE:
            self._moved(new, new_name, old, name)
            self._nodes.exchange(old, name, new, new_name)
        else:
            self._specials.remove(new.identity, new_name)
            self._nodes.move(old, name, new, new_name)

    # Attributes.

    def getattr(self, node: Node) -> tuple[HostAttr | Special, Lifetime]:
        target = self._nodes[node]
        attr = self._stat(target)
        return attr, self._coherence.lifetime(target, attr)

    def setattr(self, node: Node, changes: SetAttr) -> tuple[HostAttr | Special, Lifetime]:
        target = self._for_change(node)
        if changes.valid & (SetAttrField.UID | SetAttrField.GID):
            refuse_chown(self._stat(target), changes)
        special = self._specials.known(target.identity)
        if special is not None:
            special.change(changes, MODE)
            return special, self._coherence.lifetime(target, special)
        if changes.valid & SetAttrField.SIZE:
            os.ftruncate(self._tree.content(target, write=True), changes.size)
            self._coherence.contents_changed(target, inotify.MODIFY)
        if changes.valid & SetAttrField.MODE:
            self._tree.keep_rights(target, changes.mode)
        with self._tree.handle(target) as fd:
            set_mode_and_times(fd, target.kind, changes)
            attr = self._tree.stat_fd(fd)
        if identity(attr) != target.identity:
            self._nodes.reidentify(target, attr)
        self._coherence.contents_changed(target, inotify.ATTRIB)
        return attr, self._coherence.lifetime(target, attr)

    def statfs(self, node: Node) -> StatFs:
        stat_fs = os.fstatvfs(self._tree.root)
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
        self._coherence.contents_changed(self._nodes[node], inotify.ATTRIB)

    def listxattr(self, node: Node) -> list[bytes]:
        with self._xattr_path(node, _TRANSPARENT_XATTRS) as path:
            names = [os.fsencode(name) for name in os.listxattr(path)]
        return [name for name in names if name.startswith(_TRANSPARENT_XATTRS)]

    def removexattr(self, node: Node, name: bytes) -> None:
        self._for_change(node)
        with self._xattr_path(node, name) as path:
            os.removexattr(path, name)
        self._coherence.contents_changed(self._nodes[node], inotify.ATTRIB)

    # Contents.

    def read(self, node: Node, offset: int, size: int) -> bytes:
        target = self._nodes[node]
        data = os.pread(self._tree.content(target, write=False), size, offset)
        self._coherence.contents_read(target)
        return data

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        target = self._for_change(node)
        fd = self._tree.content(target, write=True)
        self._coherence.contents_changed(target, inotify.MODIFY)
        if append:
            return os.pwritev(fd, [data], offset, os.RWF_APPEND)
        return os.pwrite(fd, data, offset)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        self.sync_later(node, data_only=data_only)()

    def sync_later(self, node: Node, *, data_only: bool) -> Callable[[], None]:
        target = self._nodes[node]
        is_directory = target.kind == stat.S_IFDIR
        fd = (
            self._tree.open_directory(target)
            if is_directory
            else os.dup(self._tree.syncable(target))
        )
        return functools.partial(_sync, fd, data_only=data_only)

    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        target = self._for_change(node)
        syscalls.allocate(self._tree.content(target, write=True), mode, offset, length)
        self._coherence.contents_changed(target, inotify.MODIFY)

    def seek(self, node: Node, offset: int, whence: int) -> int:
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise refuse(errno.EINVAL)
        return os.lseek(self._tree.any_content(self._nodes[node]), offset, whence)

    def copy_range(
        self, node: Node, offset: int, target: Node, target_offset: int, length: int
    ) -> int:
        # Duplicated, because opening the target may close what the set held for the source.
        source = os.dup(self._tree.content(self._nodes[node], write=False))
        try:
            destination = self._tree.content(self._for_change(target), write=True)
            self._coherence.contents_changed(self._nodes[target], inotify.MODIFY)
            return os.copy_file_range(
                source, destination, min(length, COPY_CHUNK), offset, target_offset
            )
        finally:
            os.close(source)

    # Changes.

    def _for_change(self, node: Node) -> HostNode:
        if self.readonly:
            raise refuse(errno.EROFS)
        return self._nodes[node]

    @contextmanager
    def _xattr_path(self, node: Node, name: bytes) -> Iterator[str]:
        """Yield a path for the xattr calls; only regular files and directories may have `user.` attributes."""
        target = self._nodes[node]
        if not name.startswith(_TRANSPARENT_XATTRS):
            raise refuse(errno.EOPNOTSUPP)
        if target.kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise refuse(errno.EOPNOTSUPP)
        with self._tree.handle(target) as fd:
            yield through_proc(fd)

    def _moved(self, old: HostNode, name: bytes, new: HostNode, new_name: bytes) -> None:
        """Note a rename, before the table knows of it: it changes the ctime of what is moved."""
        self._coherence.names_changed(old, name, inotify.MOVED_FROM)
        self._coherence.names_changed(new, new_name, inotify.MOVED_TO)
        moved = old.children.get(name)
        if moved is not None:
            moved.told = UNTOLD

    def _entry(self, directory: HostNode, node: HostNode, attr: HostAttr | Special) -> Entry:
        return Entry(node.id, attr, self._coherence.lifetime(node, attr, directory))

    def _stat(self, node: HostNode) -> HostAttr | Special:
        return self._specials.known(node.identity) or self._tree.stat(node)

    def _refuse_specials(self, directory: HostNode | None) -> None:
        """Refuse to take away a directory that looks empty to the host only."""
        if directory is not None and self._specials.within(directory.identity):
            raise refuse(errno.ENOTEMPTY)

    def _is_there(self, directory: Identity) -> bool:
        """Tell whether the guest knows a directory, and it is where it was seen."""
        node = self._nodes.known(directory)
        if node is None:
            return False
        try:
            self._tree.walk(node)
        except OSError:
            return False
        return True

    def _create_existing(self, parent: Node, name: bytes, flags: int) -> Entry:
        """Answer a create that lost against another: the file is there, and is opened instead."""
        entry = self.lookup(parent, name)
        node = self._nodes[entry.node]
        try:
            if node.kind != stat.S_IFREG:
                raise refuse(errno.ESTALE)  # the guest's kernel looks again, and then knows better
            if not flags & os.O_TRUNC:
                return entry
            os.ftruncate(self._tree.content(node, write=True), 0)
            self._coherence.contents_changed(node, inotify.MODIFY)
            return self._entry(self._nodes[parent], node, self._stat(node))
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
        if self._tree.exists(new, new_name) or self._specials.get(new.identity, new_name):
            if flags & syscalls.RENAME_NOREPLACE:
                raise refuse(errno.EEXIST)
            self.unlink(new.id, new_name)
        self._specials.move(old.identity, name, new.identity, new_name)
        self._coherence.present(new, new_name)
        self._nodes.move(old, name, new, new_name)


def _sync(fd: int, *, data_only: bool) -> None:
    try:
        (os.fdatasync if data_only else os.fsync)(fd)
    finally:
        os.close(fd)


def _resolve(path: str | os.PathLike[str]) -> Path:
    operation = f"serve the directory {os.fspath(path)}"
    resolved = resolve_host_path(path, operation)
    if not resolved.is_dir():
        raise UsageError(operation, "it is not a directory", "Serve a file with HostFile")
    return resolved


def resolve_host_path(path: str | os.PathLike[str], operation: str) -> Path:
    """Return where `path`, which must exist and may begin with `~`, leads. Raises UsageError."""
    if not os.fspath(path):  # of a variable that is not set; to pathlib it is the working directory
        raise UsageError(operation, "the path is empty", 'Write "." for the working directory')
    try:
        return Path(path).expanduser().resolve(strict=True)
    except OSError as error:
        raise UsageError(operation, error.strerror or str(error), "Create it first") from error
    except RuntimeError as error:  # a home directory that is not known, or links in a circle
        raise UsageError(operation, str(error), "Write the whole path") from error
