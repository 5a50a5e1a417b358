"""One FUSE mount: a message of the guest's kernel in, the answer out. No I/O but the provider's.

Rule 1: INIT comes first and once; whatever a kernel could not have sent is FuseError, and the guest loses its sandbox.
Rule 2: a provider's OSError is the guest's errno; any other exception, or an answer longer than the kernel takes, is
    EIO and told to `report`. What gets no answer (FORGET) raises nothing.
Rule 3: OPEN is answered ENOSYS once (OPENDIR too, if what the guest learns lasts), after which the kernel opens files
    by itself and sends no RELEASE: no reply names anything that would have to be released.
Rule 4: locks stay in the guest's kernel, no page is written back late, and a changed mtime drops the cached pages:
    host and guest see one file.
"""

from __future__ import annotations

import asyncio
import errno
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from taskvm.fs.ahead import Ahead
from taskvm.fs.provider import Absent, Change, DirEntry, Entry, Provider, Source, refuse
from taskvm.wire.fuse import (
    WRITE_CACHE,
    Allocate,
    CopyRange,
    Forget,
    FuseError,
    GetXattr,
    Init,
    InitFlag,
    Link,
    MakeNode,
    Name,
    Opcode,
    Read,
    Rename,
    Request,
    Seek,
    SetAttr,
    SetXattr,
    Symlink,
    Sync,
    Write,
)
from taskvm.wire.fuse_replies import (
    DirectoryReply,
    encode_attr,
    encode_entry,
    encode_error,
    encode_init,
    encode_inval_entry,
    encode_inval_inode,
    encode_negative_entry,
    encode_open,
    encode_reply,
    encode_reply_header,
    encode_seek,
    encode_statfs,
    encode_store,
    encode_written,
)
from taskvm.wire.fuse_requests import decode_request

FLAGS = (
    InitFlag.ASYNC_READ
    | InitFlag.BIG_WRITES
    | InitFlag.AUTO_INVAL_DATA
    | InitFlag.DO_READDIRPLUS
    | InitFlag.ASYNC_DIO
    | InitFlag.NO_OPEN_SUPPORT
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.NO_OPENDIR_SUPPORT
    | InitFlag.HANDLE_KILLPRIV_V2
)
# Readahead of several files at once; each request holds at most 1 MiB, and they are answered one by one.
BACKGROUND = 64
# The kernel refuses a reply whose error is not below this (fs/fuse/dev.c).
_MAX_ERRNO = 511
_O_APPEND = 0o2000  # the guest's number, the same on every architecture we run
_O_EXCL = 0o200
# A READDIRPLUS entry is about five times as long as the host's own record of it.
_PLUS_RATIO = 5
_LEAST_READDIR = 1024

Reply = bytes | tuple[bytes, bytes]
"""A whole message, or its header and its body."""
Handler = Callable[[Request, Any], Reply | None]

_CHANGING = frozenset(
    {
        Opcode.SETATTR,
        Opcode.SYMLINK,
        Opcode.MKNOD,
        Opcode.MKDIR,
        Opcode.UNLINK,
        Opcode.RMDIR,
        Opcode.RENAME,
        Opcode.RENAME2,
        Opcode.LINK,
        Opcode.WRITE,
        Opcode.SETXATTR,
        Opcode.REMOVEXATTR,
        Opcode.CREATE,
        Opcode.FALLOCATE,
        Opcode.COPY_FILE_RANGE,
    }
)
_XATTR = frozenset({Opcode.GETXATTR, Opcode.SETXATTR, Opcode.LISTXATTR, Opcode.REMOVEXATTR})
# A call on an event loop of the provider's own may end with this one, which is no Exception.
_BUGS = (Exception, asyncio.CancelledError)
_MAX_TARGET = 4095  # PATH_MAX with its NUL: the kernel takes a page at most
# Requests that get no reply, whatever happens.
SILENT = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY})


class SessionState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a session is saved with its guest."""

    started: bool
    provider: bytes


class Session:
    """Serves one mount from `provider`.

    `report` gets (what was asked, the unexpected exception), `tell` messages that the guest did not ask for. `aside`
    runs in another thread what returns an answer, and sends that; it returns False when it cannot.
    """

    def __init__(
        self,
        provider: Provider,
        report: Callable[[str, BaseException], None],
        tell: Callable[[bytes], None],
        aside: Callable[[Callable[[], Reply]], bool] | None = None,
    ) -> None:
        self.provider = provider
        self._aside = aside
        self._report = report
        self._tell = tell
        self._ahead = Ahead() if provider.readonly else None
        self._started = False
        self._given: list[
            int
        ] = []  # by the last request: nodes that the guest has a reference more to
        self._handlers: dict[int, Handler] = {
            Opcode.INIT: self._init,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.OPENDIR: self._opendir,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.CREATE: self._create,
            Opcode.SETATTR: self._setattr,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.SYMLINK: self._symlink,
            Opcode.LINK: self._link,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename,
            Opcode.READLINK: self._readlink,
            Opcode.STATFS: self._statfs,
            Opcode.FSYNC: self._fsync,
            Opcode.FSYNCDIR: self._fsync,
            Opcode.GETXATTR: self._getxattr,
            Opcode.SETXATTR: self._setxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.REMOVEXATTR: self._removexattr,
            Opcode.FALLOCATE: self._allocate,
            Opcode.LSEEK: self._seek,
            Opcode.COPY_FILE_RANGE: self._copy_range,
            Opcode.DESTROY: self._destroy,
        }

    def handle(self, message: memoryview) -> Reply | None:
        """Serve one request; None when it gets no reply, or gets it later. Raises FuseError."""
        self._given.clear()
        request = decode_request(message)
        opcode = request.opcode
        if self._started is (opcode == Opcode.INIT):
            raise FuseError("INIT is not the first request, or not the only one of its kind")
        if opcode in SILENT:
            self._forget(request.arguments)
            return None
        handler = self._handlers.get(opcode)
        if handler is None:
            return encode_error(request.unique, errno.ENOSYS)
        if opcode in _XATTR and not self.provider.xattrs:
            return encode_error(request.unique, errno.ENOSYS)  # the kernel asks no more
        if opcode in _CHANGING and self.provider.readonly:
            return encode_error(request.unique, errno.EROFS)
        try:
            return handler(request, request.arguments)
        except OSError as error:
            return _refusal(request.unique, error)
        except FuseError:
            raise
        except _BUGS as error:
            self._report(Opcode(opcode).name, error)
            return encode_error(request.unique, errno.EIO)

    def take_back(self) -> None:
        """Drop the references that the last request gave: the guest does not hear of them."""
        with self._reporting("FORGET"):
            for node in self._given:
                self.provider.forget(node, 1)

    def rest(self) -> None:
        """Let the provider let go of what it only keeps for speed."""
        with self._reporting("rest"):
            self.provider.rest()

    def attend(self, source: Source) -> bool:
        """Let the provider look at what it watches; tell whether that went well."""
        with self._reporting("the source of a provider"):
            source.ready()
            return True
        return False

    def close(self) -> None:
        """Close the provider."""
        with self._reporting("close"):
            self.provider.close()

    @contextmanager
    def _reporting(self, operation: str) -> Iterator[None]:
        try:
            yield
        except _BUGS as error:
            self._report(operation, error)

    @staticmethod
    def notification(change: Change) -> bytes:
        """Return the message that makes the guest's kernel forget what `change` made wrong."""
        if change.name is None:
            return encode_inval_inode(change.node)
        return encode_inval_entry(change.node, change.name)

    # A saved guest.

    def export(self) -> bytes:
        """Return what a later session needs to serve this mount on."""
        state = SessionState(started=self._started, provider=self.provider.export_state())
        return msgspec.msgpack.encode(state)

    def resume(self, exported: bytes) -> None:
        """Serve on, as the first thing, what an earlier session has exported. Raises ValueError."""
        state = msgspec.msgpack.decode(exported, type=SessionState)
        self.provider.import_state(state.provider)
        self._started = state.started

    # The mount.

    def _init(self, request: Request, init: Init) -> Reply:
        reply = encode_init(request.unique, init, FLAGS, BACKGROUND)
        # A kernel of a later major asks once more, in our version.
        self._started = init.major == 7
        return reply

    def _destroy(self, request: Request, _arguments: None) -> Reply:
        return encode_reply(request.unique)

    def _statfs(self, request: Request, _arguments: None) -> Reply:
        return encode_statfs(request.unique, self.provider.statfs(request.node))

    def _forget(self, arguments: object) -> None:
        if isinstance(arguments, Forget):
            with self._reporting("FORGET"):
                for node, count in arguments.nodes:
                    self.provider.forget(node, count)

    # Names.

    def _lookup(self, request: Request, lookup: Name) -> Reply:
        try:
            entry = self.provider.lookup(request.node, lookup.name)
        except Absent as error:
            return encode_negative_entry(request.unique, error.lifetime_ns)
        return self._entry(request, entry)

    def _entry(self, request: Request, entry: Entry, more: bytes = b"") -> Reply:
        self._given.append(entry.node)
        return encode_entry(request.unique, entry.node, entry.attr, entry.lifetime, more)

    def _opendir(self, request: Request, _arguments: None) -> Reply:
        if self.provider.lasting:
            return encode_error(request.unique, errno.ENOSYS)  # rule 3, and listings are kept
        return encode_reply(request.unique, encode_open(0, 0))

    def _releasedir(self, request: Request, _arguments: None) -> Reply:
        return encode_reply(request.unique)

    def _readdir(self, request: Request, read: Read) -> Reply:
        reply = DirectoryReply(request.unique, read.size)
        size = max(read.size, _LEAST_READDIR)
        for entry in self.provider.readdir(request.node, read.offset, size):
            if not reply.fits(entry.name, plus=False):
                break
            reply.add(entry.ino, entry.offset, entry.kind, entry.name)
        return reply.encode()

    def _readdirplus(self, request: Request, read: Read) -> Reply:
        reply = DirectoryReply(request.unique, read.size)
        if self._ahead is not None and not read.offset:
            self._ahead.listing(request.node)
        size = max(read.size // _PLUS_RATIO, _LEAST_READDIR)
        for entry in self.provider.readdir(request.node, read.offset, size):
            if not reply.fits(entry.name, plus=True):
                break
            self._add_plus(reply, request.node, entry)
            reply.add(entry.ino, entry.offset, entry.kind, entry.name)
        return reply.encode()

    def _add_plus(self, reply: DirectoryReply, parent: int, entry: DirEntry) -> None:
        if entry.name in (b".", b".."):  # the kernel wants no references to these
            reply.add_plus_nothing()
            return
        try:
            child = self.provider.lookup(parent, entry.name)
        except OSError:  # it went away, or may not be looked at: its name is still told
            reply.add_plus_nothing()
        else:
            self._given.append(child.node)
            reply.add_plus(child.node, child.attr, child.lifetime)
            if self._ahead is not None:
                self._ahead.listed(parent, child.node, child.attr)

    def _create(self, request: Request, create: MakeNode) -> Reply:
        entry = self.provider.create(request.node, create.name, create.mode, create.flags)
        more = encode_open(0, 0)
        return self._entry(request, entry, more)

    def _mknod(self, request: Request, make: MakeNode) -> Reply:
        entry = self.provider.mknod(request.node, make.name, make.mode)
        return self._entry(request, entry)

    def _mkdir(self, request: Request, make: MakeNode) -> Reply:
        entry = self.provider.mkdir(request.node, make.name, make.mode)
        return self._entry(request, entry)

    def _symlink(self, request: Request, link: Symlink) -> Reply:
        entry = self.provider.symlink(request.node, link.name, link.target)
        return self._entry(request, entry)

    def _link(self, request: Request, link: Link) -> Reply:
        entry = self.provider.link(link.target, request.node, link.name)
        return self._entry(request, entry)

    def _unlink(self, request: Request, unlink: Name) -> Reply:
        self.provider.unlink(request.node, unlink.name)
        return encode_reply(request.unique)

    def _rmdir(self, request: Request, rmdir: Name) -> Reply:
        self.provider.rmdir(request.node, rmdir.name)
        return encode_reply(request.unique)

    def _rename(self, request: Request, rename: Rename) -> Reply:
        self.provider.rename(
            request.node, rename.name, rename.new_parent, rename.new_name, rename.flags
        )
        return encode_reply(request.unique)

    def _readlink(self, request: Request, _arguments: None) -> Reply:
        target = self.provider.readlink(request.node)
        return encode_reply(request.unique, _at_most(_MAX_TARGET, target))

    # Attributes.

    def _getattr(self, request: Request, _arguments: None) -> Reply:
        attr, lifetime = self.provider.getattr(request.node)
        return encode_attr(request.unique, attr, lifetime)

    def _setattr(self, request: Request, changes: SetAttr) -> Reply:
        attr, lifetime = self.provider.setattr(request.node, changes)
        return encode_attr(request.unique, attr, lifetime)

    def _getxattr(self, request: Request, get: GetXattr) -> Reply:
        return _sized(request, get, self.provider.getxattr(request.node, get.name))

    def _listxattr(self, request: Request, get: GetXattr) -> Reply:
        names = self.provider.listxattr(request.node)
        return _sized(request, get, b"".join(name + b"\0" for name in names))

    def _setxattr(self, request: Request, change: SetXattr) -> Reply:
        self.provider.setxattr(request.node, change.name, change.value, change.flags)
        return encode_reply(request.unique)

    def _removexattr(self, request: Request, remove: Name) -> Reply:
        self.provider.removexattr(request.node, remove.name)
        return encode_reply(request.unique)

    # Contents.

    def _read(self, request: Request, read: Read) -> Reply:
        data = _at_most(read.size, self.provider.read(request.node, read.offset, read.size))
        if self._ahead is not None and not read.offset:
            for node, size in self._ahead.read(request.node):
                self._push(node, size)
        return encode_reply_header(request.unique, len(data)), data

    def _push(self, node: int, size: int) -> None:
        """Give the guest a file that it has not asked for, through all that the provider would check if it had."""
        with suppress(OSError):  # forgotten, or gone: the guest will ask, or not
            data = self.provider.read(node, 0, size)
            if len(data) == size:
                self._tell(encode_store(node, 0, data))

    def _write(self, request: Request, write: Write) -> Reply:
        cached = write.write_flags & WRITE_CACHE != 0
        append = write.flags & _O_APPEND != 0 and not cached
        written = self.provider.write(request.node, write.offset, write.data, append=append)
        # Who wrote to a mapping is told of nothing but an error: the kernel does not look at how much was written.
        while cached and written < len(write.data):
            rest = write.data[written:]
            more = self.provider.write(request.node, write.offset + written, rest, append=False)
            if more <= 0:
                raise refuse(errno.EIO)
            written += more
        return encode_written(request.unique, written)

    def _fsync(self, request: Request, sync: Sync) -> Reply | None:
        later = None
        if self._aside is not None:
            later = self.provider.sync_later(request.node, data_only=sync.data_only)
        if later is None:
            self.provider.fsync(request.node, data_only=sync.data_only)
            return encode_reply(request.unique)
        finish = functools.partial(self._finish, request.unique, later)
        return None if self._aside is not None and self._aside(finish) else finish()

    def _finish(self, unique: int, later: Callable[[], None]) -> Reply:
        """Return the answer of what is done in another thread."""
        try:
            later()
        except OSError as error:
            return _refusal(unique, error)
        except _BUGS as error:
            self._report("sync_later", error)
            return encode_error(unique, errno.EIO)
        return encode_reply(unique)

    def _allocate(self, request: Request, allocate: Allocate) -> Reply:
        self.provider.allocate(request.node, allocate.offset, allocate.length, allocate.mode)
        return encode_reply(request.unique)

    def _seek(self, request: Request, seek: Seek) -> Reply:
        offset = self.provider.seek(request.node, seek.offset, seek.whence)
        return encode_seek(request.unique, offset)

    def _copy_range(self, request: Request, copy: CopyRange) -> Reply:
        copied = self.provider.copy_range(
            request.node, copy.offset, copy.target, copy.target_offset, copy.length
        )
        return encode_written(request.unique, copied)


def _refusal(unique: int, error: OSError) -> Reply:
    number = error.errno or errno.EIO
    return encode_error(unique, number if 0 < number <= _MAX_ERRNO else errno.EIO)


def _at_most(size: int, data: bytes) -> bytes:
    if len(data) > size:
        raise ValueError(f"the provider returned {len(data)} bytes where {size} are the most")
    return data


def _sized(request: Request, get: GetXattr, value: bytes) -> Reply:
    """Answer with the value, or its length when none was asked for, or ERANGE."""
    if not get.size:
        return encode_written(request.unique, len(value))
    if len(value) > get.size:
        return encode_error(request.unique, errno.ERANGE)
    return encode_reply(request.unique, value)
