"""The contract between the file system server and what serves a mount.

A provider is a tree of nodes. A node is an int that the provider chose, never used twice in its life; 1 is the root.
The names that reach a provider are single components, checked by the decoder (wire/fuse_requests.py): never empty, `.`
or `..`, no slash, no NUL.

1. Calls come one at a time. Those to a provider that is not `prompt` come from a thread of this mount's own, and one
   that blocks stops this mount only; after `request_deadline_s` the guest gets ETIMEDOUT.
2. A refusal is an OSError with the errno that the guest shall see. An unknown node is ESTALE. Anything else that is
   raised is a bug: the guest sees EIO.
3. Every Entry that is returned is one reference to its node, until `forget`. A node without references may be
   dropped; an unlinked node with references can still be read, written and asked for its attributes.
4. No method keeps an argument that is a memoryview beyond its return.
5. `readonly` is asked before each call that changes something, so a read-only provider need not refuse each one.
6. A provider that learns of changes from elsewhere calls `changes` (from any thread); until then it must answer with
   lifetimes short enough that a guest may believe them. What it learns them from can be a descriptor (`sources`).
7. A provider that wraps others passes on their `sources`, and what they tell through `changes`, in its own nodes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from taskvm.wire.fuse import SetAttr
from taskvm.wire.fuse_replies import Attr, Lifetime, StatFs

Node = int
ROOT: Node = 1


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A node under a name, with its attributes and how long the guest may believe both."""

    node: Node
    attr: Attr
    lifetime: Lifetime


class DirEntry(msgspec.Struct, frozen=True, gc=False):
    """One line of a directory. `kind` is a DT_* number, `offset` resumes the reading after this entry."""

    name: bytes
    ino: int
    kind: int
    offset: int


class Change(msgspec.Struct, frozen=True, gc=False):
    """Something that the guest may remember wrongly.

    With a name: what `name` in the directory `node` stands for. Without: the attributes and contents of `node`.
    """

    node: Node
    name: bytes | None = None


class Absent(FileNotFoundError):  # noqa: N818 - what a lookup finds, like StopIteration
    """The ENOENT of `lookup`, for a name whose absence the guest may remember for `lifetime_ns`."""

    def __init__(self, lifetime_ns: int) -> None:
        super().__init__(errno.ENOENT, "ENOENT")
        self.lifetime_ns = lifetime_ns


class Source(NamedTuple):
    """A descriptor, and what the server's thread calls whenever it is readable."""

    fd: int
    ready: Callable[[], None]


def refuse(number: int) -> OSError:
    """Return the error that answers a request with `number`."""
    return OSError(number, errno.errorcode.get(number, "?"))


def _ignore(change: Change) -> None:
    """Nobody listens for changes yet."""


class Provider:
    """What serves a mount. Every method here refuses as a file system without that ability does."""

    readonly: bool = False
    is_file: bool = False
    """Whether the root is a regular file, which is mounted on one, and not a directory."""
    lasting: bool = False
    """Whether lifetimes are long, so that the guest may keep whole listings. With short ones a listing
    that it kept costs a LOOKUP for each name that is used; one that it reads again brings the attributes
    along (a second `grep -r` over 5000 files in 100 directories: 5001 requests against 408)."""
    xattrs: bool = True
    """Whether there are extended attributes. A guest asks each file that is written first for one."""
    prompt: bool = False
    """Whether no call waits for more than this host's own memory and disks: no network, nothing of the user's. What is
    prompt is served in the thread that all mounts share, which spares each request a change of threads."""
    request_deadline_s: float = 60.0
    """How long one request may take, for what is not prompt. The call is not ended by it, for nothing can do that."""
    changes: Callable[[Change], None] = staticmethod(_ignore)
    """Set by the server; see rule 6."""

    def opened(self) -> Provider:
        """Return what serves one mount; the server closes it with the mount.

        A provider that can serve several mounts returns a new one each time, with nodes of its own. This one returns
        itself, so it serves one mount at a time: two would mix up their references, and only the last hears of changes.
        """
        return self

    def close(self) -> None:
        """Let go of everything held. Idempotent; no other call follows."""

    def sources(self) -> Sequence[Source]:
        """Return what to watch on behalf of this provider, from `opened` to `close`; not while the guest is at rest."""
        return ()

    def rest(self) -> None:
        """Let go of what is only kept for speed and was not used for a second.

        Called once in each second in which the guest asks for something, and once more in the next.
        """

    def export_state(self) -> bytes:
        """Return what `import_state` needs to give the nodes of now their numbers again; the guest is at rest."""
        raise refuse(errno.EOPNOTSUPP)

    def import_state(self, state: bytes) -> None:
        """Go on, freshly opened, where `export_state` of an earlier provider of the same thing stopped.

        Tells through `changes` what is no longer as the guest knows it; a node that is not there any more is ESTALE.
        Raises ValueError when `state` is not one.
        """
        raise refuse(errno.EOPNOTSUPP)

    # Names.

    def lookup(self, parent: Node, name: bytes) -> Entry:
        """Return what `name` stands for; ENOENT when nothing, as Absent where that may be remembered."""
        raise refuse(errno.ENOENT)

    def forget(self, node: Node, count: int) -> None:
        """Drop `count` references. Never raises; unknown nodes and too large counts are ignored."""

    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        """Return about `size` bytes of entries after `offset` (0 is the start); empty at the end.

        `.` and `..` are among them. An offset stays valid while the directory changes: what is
        neither added nor removed appears exactly once, wherever the caller stops and resumes.
        """
        raise refuse(errno.ENOTDIR)

    def readlink(self, node: Node) -> bytes:
        """Return the target of a symbolic link, which is data: nobody here follows it."""
        raise refuse(errno.EINVAL)

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        """Create a regular file. Without O_EXCL in `flags` an existing one is returned (and cut with O_TRUNC)."""
        raise refuse(errno.ENOSYS)

    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        """Create a regular file, FIFO or socket; EPERM for a device."""
        raise refuse(errno.EPERM)

    def mkdir(self, parent: Node, name: bytes, mode: int) -> Entry:
        """Create a directory."""
        raise refuse(errno.EPERM)

    def symlink(self, parent: Node, name: bytes, target: bytes) -> Entry:
        """Create a symbolic link."""
        raise refuse(errno.EPERM)

    def link(self, node: Node, parent: Node, name: bytes) -> Entry:
        """Give `node` a further name."""
        raise refuse(errno.EPERM)

    def unlink(self, parent: Node, name: bytes) -> None:
        """Remove a name that is not a directory's."""
        raise refuse(errno.EPERM)

    def rmdir(self, parent: Node, name: bytes) -> None:
        """Remove an empty directory."""
        raise refuse(errno.EPERM)

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        """Move a name, atomically, with the flags of renameat2(2)."""
        raise refuse(errno.EPERM)

    # Attributes.

    def getattr(self, node: Node) -> tuple[Attr, Lifetime]:
        """Return the attributes."""
        raise refuse(errno.ESTALE)

    def setattr(self, node: Node, changes: SetAttr) -> tuple[Attr, Lifetime]:
        """Change what `changes.valid` names; all of it or, on an error, possibly the first part.

        Set-user-id and set-group-id are never set. Changing the owner to what it is succeeds; otherwise EPERM.
        """
        raise refuse(errno.EPERM)

    def statfs(self, node: Node) -> StatFs:
        """Return the size of the file system and what is free."""
        raise refuse(errno.ENOSYS)

    def getxattr(self, node: Node, name: bytes) -> bytes:
        """Return an extended attribute; ENODATA when there is none, EOPNOTSUPP for a name outside `user.`."""
        raise refuse(errno.EOPNOTSUPP)

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute, with the flags of setxattr(2)."""
        raise refuse(errno.EOPNOTSUPP)

    def listxattr(self, node: Node) -> list[bytes]:
        """Return the names of the extended attributes that getxattr would answer."""
        return []

    def removexattr(self, node: Node, name: bytes) -> None:
        """Remove an extended attribute; ENODATA when there is none."""
        raise refuse(errno.EOPNOTSUPP)

    # Contents. There are no handles: the guest's kernel opens and closes by itself (no_open).

    def read(self, node: Node, offset: int, size: int) -> bytes:
        """Return up to `size` bytes; fewer only at the end of the file."""
        raise refuse(errno.ENOSYS)

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        """Write all of `data`, or fail; with `append` at the end, wherever that is by now."""
        raise refuse(errno.ENOSYS)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        """Return when the node is on stable storage."""
        raise refuse(errno.ENOSYS)

    def sync_later(self, node: Node, *, data_only: bool) -> Callable[[], None] | None:
        """Return what does the same as `fsync`, once, in another thread, and needs nothing of this provider any more.

        None where only `fsync` does it. Asked of what is prompt, whose other requests need not wait for a disk then.
        """
        return None

    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        """Reserve or free space, as fallocate(2) does."""
        raise refuse(errno.EOPNOTSUPP)

    def seek(self, node: Node, offset: int, whence: int) -> int:
        """Return the next data or hole, as lseek(2) does."""
        raise refuse(errno.ENOSYS)

    def copy_range(
        self, node: Node, offset: int, target: Node, target_offset: int, length: int
    ) -> int:
        """Copy up to `length` bytes and return how many; the guest asks again for the rest."""
        raise refuse(errno.EOPNOTSUPP)
