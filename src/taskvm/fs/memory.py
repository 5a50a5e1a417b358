"""A tree in the host's memory as a provider: it begins empty and is gone with the mount.

Everything that a guest can put into it is charged against one limit, contents and names alike, so a guest cannot take
the host's memory. Nobody but the guest changes it: what the guest was told stays true, absent names included.
"""

from __future__ import annotations

import copy
import errno
import os
import stat
import time
from typing import Self

import msgspec

from taskvm.fs.attributes import BLOCK, Attributes
from taskvm.fs.inode import Inode, InodeState, export_inodes, restore_inodes
from taskvm.fs.provider import ROOT, Absent, DirEntry, Entry, Node, Provider, refuse
from taskvm.fs.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from taskvm.wire.fuse import SetAttr, SetAttrField
from taskvm.wire.fuse_replies import Lifetime, StatFs

DEFAULT_LIMIT = 256 * 1024 * 1024
# What is saved with a guest's memory: copied while the guest stands still, and once more in each that starts from it.
MAX_SAVED = 32 * 1024 * 1024
# What a node, a name or an attribute costs besides its bytes; measured with tracemalloc, rounded up.
NODE_COST = 1024
ENTRY_COST = 256
MAX_NAME = 255
_DAY_NS = 86_400_000_000_000
LIFETIME = Lifetime(entry_ns=_DAY_NS, attr_ns=_DAY_NS)
_MODE = 0o1777
_KINDS = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)
_XATTR_CREATE, _XATTR_REPLACE = 1, 2
_PUNCH_HOLE = 1 | 2  # fallocate(2), with KEEP_SIZE


class MemoryState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a mount is saved with its guest: all of it."""

    used: int
    following: Node
    inodes: list[InodeState]


class Memory(Provider):
    """Serves each mount with a new, empty tree of at most `limit_bytes`, owned by the user of this process."""

    lasting = True
    prompt = True

    def __init__(self, *, limit_bytes: int = DEFAULT_LIMIT) -> None:
        self._limit = limit_bytes
        self._owner = (os.getuid(), os.getgid())
        self._begin()

    def _begin(self) -> None:
        self._used = 0
        root = Inode(ROOT, stat.S_IFDIR | 0o755)
        root.links = 1
        self._inodes: dict[Node, Inode] = {ROOT: root}
        self._next = ROOT + 1

    def opened(self) -> Self:
        served = copy.copy(self)  # a subclass stays one
        served._begin()
        return served

    def close(self) -> None:
        self._inodes.clear()

    def export_state(self) -> bytes:
        if self._used > MAX_SAVED:
            raise OSError(
                errno.EFBIG,
                f"it holds {self._used >> 20} MiB, and {MAX_SAVED >> 20} MiB are the most that is saved",
            )
        state = MemoryState(
            used=self._used, following=self._next, inodes=export_inodes(self._inodes)
        )
        return msgspec.msgpack.encode(state)

    def import_state(self, state: bytes) -> None:
        saved = msgspec.msgpack.decode(state, type=MemoryState)
        self._inodes = restore_inodes(saved.inodes)
        self._used, self._next = saved.used, saved.following

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        return self._entry(self._child(self._directory(parent), name))

    def forget(self, node: Node, count: int) -> None:
        inode = self._inodes.get(node)
        if inode is not None:
            inode.references -= count
            self._drop_unused(inode)

    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        directory = self._directory(node)
        own, above = directory, directory.parent
        listed = [DirEntry(b".", own.node, stat.S_IFDIR >> 12, 1)] if offset < 1 else []
        if offset < 2:
            listed.append(DirEntry(b"..", above.node, stat.S_IFDIR >> 12, 2))
        for name, (cookie, inode) in directory.entries.items():
            if cookie > offset:
                listed.append(DirEntry(name, inode.node, inode.kind >> 12, cookie))
                size -= 24 + len(name)
                if size < 0:
                    break
        return listed

    def readlink(self, node: Node) -> bytes:
        inode = self._inode(node)
        if inode.kind != stat.S_IFLNK:
            raise refuse(errno.EINVAL)
        return bytes(inode.data)

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        known = self._directory(parent).entries.get(name)
        if known is None:
            return self._make(parent, name, stat.S_IFREG | (mode & _MODE))
        inode = known[1]
        if flags & os.O_EXCL or inode.kind != stat.S_IFREG:
            raise refuse(errno.EEXIST)
        if flags & os.O_TRUNC:
            self._resize(inode, 0)
        return self._entry(inode)

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind not in _KINDS:
            raise refuse(errno.EPERM)
        return self._make(parent, name, kind | (mode & _MODE))

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        return self._make(parent, name, stat.S_IFDIR | (mode & _MODE))

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        return self._make(parent, name, stat.S_IFLNK | 0o777, target)

    def link(self, node: Node, parent: Node, name: bytes) -> Entry:
        inode, directory = self._inode(node), self._directory(parent)
        if inode.kind == stat.S_IFDIR:
            raise refuse(errno.EPERM)
        if not inode.links:
            raise refuse(errno.ENOENT)
        self._refuse_name(directory, name)
        self._attach(directory, name, inode)
        return self._entry(inode)

    def unlink(self, parent: Node, name: bytes) -> None:
        directory = self._directory(parent)
        if self._child(directory, name).kind == stat.S_IFDIR:
            raise refuse(errno.EISDIR)
        self._detach(directory, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        directory = self._directory(parent)
        self._refuse_removal(self._child(directory, name))
        self._detach(directory, name)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise refuse(errno.EINVAL)
        old, new = self._directory(parent), self._directory(new_parent)
        moved = self._child(old, name)
        self._refuse_circle(moved, new)
        known = new.entries.get(new_name)
        if flags & RENAME_EXCHANGE:
            other = self._child(new, new_name)
            self._refuse_circle(other, old)
            self._swap(old, name, moved, new, new_name, other)
            return
        if known is not None:
            if flags & RENAME_NOREPLACE:
                raise refuse(errno.EEXIST)
            if known[1] is moved:
                return
            self._refuse_replacement(moved, known[1])
            self._detach(new, new_name)
        self._refuse_name(new, new_name)
        self._attach(new, new_name, moved)
        self._detach(old, name)

    # Attributes.

    def getattr(self, node: Node) -> tuple[Attributes, Lifetime]:
        return self._attr(self._inode(node)), LIFETIME

    def setattr(self, node: Node, changes: SetAttr) -> tuple[Attributes, Lifetime]:
        inode, valid = self._inode(node), changes.valid
        uid, gid = self._owner
        if (valid & SetAttrField.UID and changes.uid != uid) or (
            valid & SetAttrField.GID and changes.gid != gid
        ):
            raise refuse(errno.EPERM)
        if valid & SetAttrField.SIZE:
            self._resize(self._file(node), changes.size)
        if valid & SetAttrField.MODE:
            inode.mode = inode.kind | (changes.mode & _MODE)
        inode.ctime_ns = time.time_ns()
        if valid & (SetAttrField.ATIME | SetAttrField.ATIME_NOW):
            now = valid & SetAttrField.ATIME_NOW
            inode.atime_ns = inode.ctime_ns if now else changes.atime_ns
        if valid & (SetAttrField.MTIME | SetAttrField.MTIME_NOW):
            now = valid & SetAttrField.MTIME_NOW
            inode.mtime_ns = inode.ctime_ns if now else changes.mtime_ns
        return self._attr(inode), LIFETIME

    def statfs(self, node: Node) -> StatFs:
        free = max(0, self._limit - self._used)
        return StatFs(
            blocks=self._limit // BLOCK,
            free=free // BLOCK,
            available=free // BLOCK,
            files=self._limit // NODE_COST,
            files_free=free // NODE_COST,
            block_size=BLOCK,
            fragment_size=BLOCK,
            max_name=MAX_NAME,
        )

    def getxattr(self, node: Node, name: bytes) -> bytes:
        xattrs = self._xattrs(node, name)
        if name not in xattrs:
            raise refuse(errno.ENODATA)
        return xattrs[name]

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        xattrs = self._xattrs(node, name)
        if flags & _XATTR_CREATE and name in xattrs:
            raise refuse(errno.EEXIST)
        if flags & _XATTR_REPLACE and name not in xattrs:
            raise refuse(errno.ENODATA)
        new = 0 if name in xattrs else ENTRY_COST + len(name)
        self._charge(new + len(value) - len(xattrs.get(name, b"")))
        xattrs[name] = value

    def listxattr(self, node: Node) -> list[bytes]:
        return list(self._inode(node).xattrs)

    def removexattr(self, node: Node, name: bytes) -> None:
        value = self.getxattr(node, name)
        del self._inode(node).xattrs[name]
        self._charge(-(ENTRY_COST + len(name) + len(value)))

    # Contents.

    def read(self, node: Node, offset: int, size: int) -> bytes:
        with memoryview(self._file(node).data) as view:
            return bytes(view[offset : offset + size])

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        inode = self._file(node)
        start = len(inode.data) if append else offset
        if start + len(data) > len(inode.data):
            self._resize(inode, start + len(data))
        inode.data[start : start + len(data)] = data
        inode.touched()
        return len(data)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        self._inode(node)

    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        inode = self._file(node)
        if mode == 0:
            if offset + length > len(inode.data):
                self._resize(inode, offset + length)
        elif mode == _PUNCH_HOLE:
            end = min(offset + length, len(inode.data))
            inode.data[offset:end] = bytes(max(0, end - offset))
            inode.touched()
        else:
            raise refuse(errno.EOPNOTSUPP)

    # Inodes.

    def _inode(self, node: Node) -> Inode:
        inode = self._inodes.get(node)
        if inode is None:
            raise refuse(errno.ESTALE)
        return inode

    def _directory(self, node: Node) -> Inode:
        inode = self._inode(node)
        if inode.kind != stat.S_IFDIR:
            raise refuse(errno.ENOTDIR)
        return inode

    def _file(self, node: Node) -> Inode:
        inode = self._inode(node)
        if inode.kind != stat.S_IFREG:
            raise refuse(errno.EISDIR if inode.kind == stat.S_IFDIR else errno.EINVAL)
        return inode

    def _child(self, directory: Inode, name: bytes) -> Inode:
        if len(name) > MAX_NAME:
            raise refuse(errno.ENAMETOOLONG)
        known = directory.entries.get(name)
        if known is None:
            raise Absent(_DAY_NS)
        return known[1]

    def _xattrs(self, node: Node, name: bytes) -> dict[bytes, bytes]:
        inode = self._inode(node)
        if not name.startswith(b"user.") or inode.kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise refuse(errno.EOPNOTSUPP)
        return inode.xattrs

    def _make(self, parent: Node, name: bytes, mode: int, data: bytes = b"") -> Entry:
        directory = self._directory(parent)
        self._refuse_name(directory, name)
        # Names are charged here too, so that nothing is made when there is no room for them.
        self._charge(NODE_COST + len(data))
        inode = Inode(self._next, mode, directory)
        inode.data += data
        self._next += 1
        self._inodes[inode.node] = inode
        try:
            self._attach(directory, name, inode)
        except OSError:
            self._drop_unused(inode)
            raise
        return self._entry(inode)

    def _attach(self, directory: Inode, name: bytes, inode: Inode) -> None:
        self._charge(ENTRY_COST + len(name))
        directory.entries[name] = (directory.next_cookie, inode)
        directory.next_cookie += 1
        directory.touched()
        inode.links += 1
        inode.ctime_ns = time.time_ns()
        if inode.kind == stat.S_IFDIR:
            inode.parent = directory

    def _detach(self, directory: Inode, name: bytes) -> None:
        _cookie, inode = directory.entries.pop(name)
        self._charge(-(ENTRY_COST + len(name)))
        directory.touched()
        inode.links -= 1
        inode.ctime_ns = time.time_ns()
        self._drop_unused(inode)

    def _swap(
        self, old: Inode, name: bytes, moved: Inode, new: Inode, new_name: bytes, other: Inode
    ) -> None:
        old.entries[name] = (old.entries[name][0], other)
        new.entries[new_name] = (new.entries[new_name][0], moved)
        for inode, parent in ((moved, new), (other, old)):
            inode.ctime_ns = time.time_ns()
            parent.touched()
            if inode.kind == stat.S_IFDIR:
                inode.parent = parent

    def _drop_unused(self, inode: Inode) -> None:
        if inode.links or inode.references > 0 or self._inodes.pop(inode.node, None) is None:
            return
        xattrs = sum(ENTRY_COST + len(name) + len(value) for name, value in inode.xattrs.items())
        self._charge(-(NODE_COST + len(inode.data) + xattrs))

    def _resize(self, inode: Inode, size: int) -> None:
        growth = size - len(inode.data)
        self._charge(growth)
        if growth > 0:
            inode.data.extend(bytes(growth))
        else:
            del inode.data[size:]
        inode.touched()

    def _charge(self, cost: int) -> None:
        """Count what is about to be held, or was let go; ENOSPC before anything is allocated."""
        if cost > 0 and self._used + cost > self._limit:
            raise refuse(errno.ENOSPC)
        self._used += cost

    def _entry(self, inode: Inode) -> Entry:
        inode.references += 1
        return Entry(inode.node, self._attr(inode), LIFETIME)

    def _attr(self, inode: Inode) -> Attributes:
        return Attributes(
            st_ino=inode.node,
            st_mode=inode.mode,
            st_nlink=inode.links,  # 1 for a directory: subdirectories are not counted, as in btrfs
            st_uid=self._owner[0],
            st_gid=self._owner[1],
            st_size=len(inode.data),
            st_blocks=(len(inode.data) + 511) // 512,
            st_blksize=BLOCK,
            st_atime_ns=inode.atime_ns,
            st_mtime_ns=inode.mtime_ns,
            st_ctime_ns=inode.ctime_ns,
        )

    # Refusals.

    def _refuse_name(self, directory: Inode, name: bytes) -> None:
        if len(name) > MAX_NAME:
            raise refuse(errno.ENAMETOOLONG)
        if name in directory.entries:
            raise refuse(errno.EEXIST)
        if not directory.links:
            raise refuse(errno.ENOENT)  # removed, but still someone's working directory

    def _refuse_removal(self, inode: Inode) -> None:
        if inode.kind != stat.S_IFDIR:
            raise refuse(errno.ENOTDIR)
        if inode.entries:
            raise refuse(errno.ENOTEMPTY)

    def _refuse_replacement(self, moved: Inode, replaced: Inode) -> None:
        if moved.kind == stat.S_IFDIR:
            self._refuse_removal(replaced)
        elif replaced.kind == stat.S_IFDIR:
            raise refuse(errno.EISDIR)

    def _refuse_circle(self, moved: Inode, new_parent: Inode) -> None:
        step = new_parent
        while step is not step.parent:
            if step is moved:
                raise refuse(errno.EINVAL)
            step = step.parent
