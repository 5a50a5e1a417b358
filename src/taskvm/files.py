"""Files of the guest, on its own disk or on a mount, over the control port. Runs beside execs and beside itself."""

from __future__ import annotations

import asyncio
import builtins
import os
import struct
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from taskvm.arguments import check_number
from taskvm.errors import GuestError, SandboxLostError, UsageError
from taskvm.filestream import receive, send
from taskvm.filewatch import MAX_WATCHES, FileWatch
from taskvm.opening import Opening
from taskvm.port import StreamReset
from taskvm.treecopy import CopyIn, CopyLimits, CopyOut
from taskvm.vm.control import Call, Control
from taskvm.wire.control import (
    AnswerError,
    ChmodRequest,
    DirEntry,
    Done,
    Failure,
    FileStat,
    FileType,
    LinkTarget,
    ListRequest,
    Mark,
    MkdirRequest,
    ReadlinkRequest,
    ReadRequest,
    ReadStarted,
    RemoveRequest,
    RenameRequest,
    Request,
    SettleRequest,
    StatRequest,
    SymlinkRequest,
    WatchRequest,
    WriteRequest,
    decode,
)

GuestPath = str | PurePosixPath
_A = TypeVar("_A", FileStat, Done, LinkTarget)

# The agent serves this many operations at once (protocol page); further ones wait here.
MAX_CONCURRENT = 32
# read_bytes refuses more than this: it would be held in the host's memory.
MAX_READ_BYTES = 256 * 1024 * 1024
# A listing becomes objects, five times its size: this is about 200 000 entries.
MAX_LISTING_BYTES = 16 * 1024 * 1024
# Removing or copying a large tree takes the guest's kernel minutes; all else is one system call.
TREE_TIMEOUT_S = 600.0
# Walking a large tree on a mount, a directory a millisecond.
WATCH_TIMEOUT_S = 120.0
MODE_BITS = 0o7777
MAX_NUMBER = 2**63 - 1  # off_t
_NOT_FOUND = 2  # ENOENT in linux/errno-base.h
_CANCELLED = 125  # ECANCELED in linux/errno.h: the host no longer wants it
_PATH_LIMIT = 4096  # PATH_MAX in linux/limits.h, with the NUL at the end
_ENTRY_LIMIT = 4096  # a name has at most 255 bytes; the map around it is small


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """What a guest path is. `mode` holds the low 12 bits; `size` is bytes; `mtime_ns` nanoseconds since 1970 UTC.

    `target` is set for a symbolic link that was not followed. `uid`, `gid`, `nlink` and `inode` are None in listings.
    """

    name: str
    type: FileType
    mode: int
    size: int
    mtime_ns: int
    uid: int | None = None
    gid: int | None = None
    nlink: int | None = None
    inode: int | None = None
    target: str | None = None

    @property
    def is_dir(self) -> bool:
        return self.type == "dir"

    @property
    def is_file(self) -> bool:
        return self.type == "file"


class Files:
    """The files of one sandbox. Paths are absolute; names that are not UTF-8 appear with surrogate escapes.

    Everything raises GuestError with the guest's errno when the guest refuses (ETIMEDOUT when it does not come to an
    end), SandboxLostError when it is gone or no longer answers, and UsageError for a path that is not absolute. New
    files belong to the sandbox's user.
    """

    def __init__(self, control: Control, uid: int, gid: int) -> None:
        self._control = control
        self._uid = uid
        self._gid = gid
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        self._watches: list[Call] = []

    async def read_bytes(
        self, path: GuestPath, *, offset: int = 0, length: int | None = None
    ) -> bytes:
        """Return the content of a file, or `length` bytes of it from `offset` on (fewer at its end).

        Raises UsageError when that is more than MAX_READ_BYTES.
        """
        operation = f"read {path}"
        request = _read_request(path, operation, offset, length)
        async with self._slots:
            call = self._control.open_call(request, operation, channels=(1,))
            try:
                await call.answer(ReadStarted)
                return await self._collect(call, operation, MAX_READ_BYTES, length)
            finally:
                call.forget(errno=None if call.inlets[1].ended else _CANCELLED)

    async def read_text(self, path: GuestPath) -> str:
        """Return the content of a UTF-8 file. Raises UnicodeDecodeError when it is not UTF-8."""
        return (await self.read_bytes(path)).decode("utf-8")

    async def open_read(
        self,
        path: GuestPath,
        *,
        offset: int = 0,
        length: int | None = None,
        follow: bool = True,
    ) -> AsyncGenerator[bytes]:
        """Yield the content of a file of any size in pieces; the guest reads no further ahead than a window.

        Without `follow` a symbolic link is an error (ELOOP). Leave early by `contextlib.aclosing`: an open one
        counts among the MAX_CONCURRENT operations.
        """
        operation = f"read {path}"
        request = _read_request(path, operation, offset, length, follow=follow)
        async with self._slots:
            call = self._control.open_call(request, operation, channels=(1,))
            try:
                await call.answer(ReadStarted)
                async for data in receive(call, operation):
                    yield data
            finally:
                call.forget(errno=None if call.inlets[1].ended else _CANCELLED)

    async def write_bytes(
        self, path: GuestPath, data: bytes, *, mode: int | None = None, parents: bool = True
    ) -> None:
        """Replace a file's content in one step: a reader sees the old content or the new.

        The bytes go to a temporary file beside it, which is synced and renamed over it: a symbolic link is replaced,
        not followed. Without `mode` a file that is there keeps its permissions, and a new one has 0644.
        """
        await self.write_stream(path, _once(data), mode=mode, parents=parents)

    async def write_stream(
        self,
        path: GuestPath,
        pieces: AsyncIterable[bytes],
        *,
        mode: int | None = None,
        parents: bool = True,
        mtime_ns: int | None = None,
    ) -> None:
        """Replace a file's content as `write_bytes`, by pieces that together may be larger than memory.

        A piece is asked for when the guest has room for it. When `pieces` raises, or this is cancelled, the old content
        stays. `mtime_ns` sets the time of modification.
        """
        operation = f"write {path}"
        check_number(operation, "mode", 0 if mode is None else mode, MODE_BITS)
        check_number(operation, "mtime_ns", 0 if mtime_ns is None else mtime_ns, MAX_NUMBER)
        request = WriteRequest(
            path=encode_path(path, operation),
            mode=-1 if mode is None else mode,
            uid=self._uid,
            gid=self._gid,
            parents=parents,
            mtime_ns=-1 if mtime_ns is None else mtime_ns,
        )
        async with self._slots:
            call = self._control.open_call(request, operation)
            try:
                await send(call, pieces, operation)
            except BaseException:
                call.forget(errno=_CANCELLED)  # the guest removes the temporary file
                raise
            call.forget()

    async def write_text(
        self, path: GuestPath, text: str, *, mode: int | None = None, parents: bool = True
    ) -> None:
        """Replace a file's content with `text` in UTF-8, in one step."""
        await self.write_bytes(path, text.encode("utf-8"), mode=mode, parents=parents)

    async def stat(self, path: GuestPath, *, follow: bool = True) -> FileInfo:
        """Return what `path` is; with `follow` what a symbolic link leads to."""
        operation = f"stat {path}"
        request = StatRequest(path=encode_path(path, operation), follow=follow)
        status = await self._request(request, FileStat, operation)
        return FileInfo(
            name=PurePosixPath(path).name,
            type=status.type,
            mode=status.mode,
            size=status.size,
            mtime_ns=status.mtime_ns,
            uid=status.uid,
            gid=status.gid,
            nlink=status.nlink,
            inode=status.ino,
            target=None if status.target is None else os.fsdecode(status.target),
        )

    async def exists(self, path: GuestPath) -> bool:
        """Return whether `path` is there, following symbolic links."""
        try:
            await self.stat(path)
        except GuestError as error:
            if error.errno == _NOT_FOUND:
                return False
            raise
        return True

    async def list(self, path: GuestPath) -> list[FileInfo]:
        """Return the entries of a directory, sorted by name. Each name is one path component.

        Raises UsageError when they take more than MAX_LISTING_BYTES.
        """
        return [_file_info(entry) for entry in await self._list(path, layer=False)]

    async def list_layer(self, path: GuestPath) -> builtins.list[tuple[FileInfo, Mark | None]]:
        """Return the entries of a directory of overlayfs' upper layer, each with what it stands for."""
        return [(_file_info(entry), entry.mark) for entry in await self._list(path, layer=True)]

    async def settle_layer(self, path: GuestPath) -> None:
        """Copy all below `path`, in a file system with an upper layer, into that layer."""
        operation = f"copy {path} into its layer"
        request = SettleRequest(path=encode_path(path, operation))
        await self._request(request, Done, operation, TREE_TIMEOUT_S)

    async def _list(self, path: GuestPath, *, layer: bool) -> builtins.list[DirEntry]:
        operation = f"list {path}"
        request = ListRequest(path=encode_path(path, operation), layer=layer)
        async with self._slots:
            call = self._control.open_call(request, operation, channels=(1,))
            try:
                await call.answer(Done)
                listing = await self._collect(call, operation, MAX_LISTING_BYTES)
            finally:
                call.forget(errno=None if call.inlets[1].ended else _CANCELLED)
        try:
            return sorted(_entries(listing), key=lambda entry: entry.name)
        except (AnswerError, struct.error, ValueError) as error:
            self._control.port.fail(f"listing of {path}: {error}")
            raise SandboxLostError(operation, "the guest answered nonsense") from error

    async def mkdir(self, path: GuestPath, *, parents: bool = False, mode: int = 0o755) -> None:
        """Make a directory; with `parents` also those above it, and one that is there is no error."""
        operation = f"make the directory {path}"
        check_number(operation, "mode", mode, MODE_BITS)
        request = MkdirRequest(
            path=encode_path(path, operation),
            mode=mode,
            uid=self._uid,
            gid=self._gid,
            parents=parents,
        )
        await self._request(request, Done, operation)

    async def chmod(self, path: GuestPath, mode: int) -> None:
        """Set the low 12 bits of the mode. A symbolic link is not followed but refused (ELOOP)."""
        operation = f"change the mode of {path}"
        check_number(operation, "mode", mode, MODE_BITS)
        await self._request(
            ChmodRequest(path=encode_path(path, operation), mode=mode), Done, operation
        )

    async def symlink(self, target: GuestPath, path: GuestPath) -> None:
        """Make `path` a symbolic link that holds `target`, which may be relative. What is at `path` stays: EEXIST."""
        operation = f"make the symbolic link {path}"
        text = os.fsencode(str(target))
        if not text or b"\0" in text:
            raise UsageError(operation, "its target is empty or has a NUL", "Name a target")
        request = SymlinkRequest(
            path=encode_path(path, operation), target=text, uid=self._uid, gid=self._gid
        )
        await self._request(request, Done, operation)

    async def readlink(self, path: GuestPath) -> str:
        """Return what the symbolic link `path` holds: any text, which may lead anywhere."""
        operation = f"read the symbolic link {path}"
        answer = await self._request(
            ReadlinkRequest(path=encode_path(path, operation)), LinkTarget, operation
        )
        if not 0 < len(answer.target) < _PATH_LIMIT or b"\0" in answer.target:
            self._control.port.fail(f"{operation}: {len(answer.target)} bytes that no link holds")
            raise SandboxLostError(operation, "the guest answered nonsense")
        return os.fsdecode(answer.target)

    async def copy_in(self, host_path: str | os.PathLike[str], guest_path: GuestPath) -> None:
        """Copy a file, a symbolic link or a whole tree of the host to `guest_path`, which is the copy's own name.

        Permissions, the files' times and symbolic links (never followed) are kept; setuid, setgid and sticky are not.
        Files that exist are replaced, directories that exist are added to. A failure leaves what was copied until
        then. Raises CopyError for a socket, FIFO or device, or a tree that is too deep.
        """
        target = os.fsdecode(encode_path(guest_path, f"copy {os.fspath(host_path)} in"))
        await CopyIn(self, Path(host_path), target).run()

    async def copy_out(
        self,
        guest_path: GuestPath,
        host_path: str | os.PathLike[str],
        *,
        limits: CopyLimits = CopyLimits(),  # noqa: B008 - frozen
    ) -> None:
        """Copy a file or a whole tree of the guest to `host_path`, where nothing may be yet.

        It appears whole or not at all, with permissions and times; the owner may always enter directories. Of a
        symbolic link what it leads to in the guest is copied, so that `host_path` is none (`readlink` reads one).
        Links in a tree are copied as they are: following one later leads wherever the guest wished.

        Raises UsageError when `host_path` exists, CopyError for a socket, FIFO, device or setuid file and when
        `limits` or the depth are exceeded, or sandboxes would lack room on the host's disk, HostError when the host
        refuses.
        """
        source = os.fsdecode(encode_path(guest_path, f"copy {guest_path} out"))
        await CopyOut(self, source, Path(host_path), limits).run()

    def watch(self, path: GuestPath, *, recursive: bool = False) -> Opening[FileWatch]:
        """Watch a file, a directory or, with `recursive`, all below it: `await` the result, or use `async with`.

            async with vm.files.watch("/work", recursive=True) as changes:
                async for change in changes: ...

        From then on every change that a program of the guest makes is told, in order. A directory that appears is
        watched from when it was seen, and what is in it by then is told as created, perhaps twice. Symbolic links are
        followed in `path` only. A watch keeps no sandbox awake. At most MAX_WATCHES are open at a time (UsageError).
        """
        return Opening(partial(self._watch, path, recursive))

    async def rename(self, path: GuestPath, to: GuestPath, *, replace: bool = True) -> None:
        """Rename `path` to `to` within one file system; without `replace` an existing `to` is EEXIST."""
        operation = f"rename {path} to {to}"
        request = RenameRequest(
            path=encode_path(path, operation), to=encode_path(to, operation), replace=replace
        )
        await self._request(request, Done, operation)

    async def remove(
        self, path: GuestPath, *, recursive: bool = False, missing_ok: bool = False
    ) -> None:
        """Remove a file or an empty directory; with `recursive` a whole tree. Symbolic links are not followed."""
        operation = f"remove {path}"
        request = RemoveRequest(
            path=encode_path(path, operation), recursive=recursive, missing_ok=missing_ok
        )
        timeout_s = TREE_TIMEOUT_S if recursive else None
        await self._request(request, Done, operation, timeout_s)

    async def _request(
        self, request: Request, kind: type[_A], operation: str, timeout_s: float | None = None
    ) -> _A:
        async with self._slots:
            return await self._control.request(request, kind, operation, timeout_s)

    async def _watch(self, path: GuestPath, recursive: bool) -> FileWatch:
        operation = f"watch {path}"
        request = WatchRequest(path=encode_path(path, operation), recursive=recursive)
        self._watches = [call for call in self._watches if not call.inlets[1].ended]
        if len(self._watches) >= MAX_WATCHES:
            raise UsageError(operation, f"{MAX_WATCHES} watches are open", "Close one")
        call = self._control.open_call(request, operation, channels=(1,), passive=True)
        self._watches.append(call)
        try:
            await call.answer(Done, WATCH_TIMEOUT_S)
        except BaseException:
            call.forget(errno=_CANCELLED)
            call.inlets[1].feed_end()
            raise
        return FileWatch(call, str(path))

    async def _collect(
        self, call: Call, operation: str, limit: int, asked: int | None = None
    ) -> bytes:
        """Return what comes on channel 1: at most `limit` bytes, and no more than were `asked` for."""
        content = bytearray()
        try:
            while data := await call.inlets[1].read(1024 * 1024):
                content += data
                if asked is not None and 0 <= asked < len(content):
                    self._control.port.fail(f"{operation}: more than the {asked} bytes asked for")
                    raise SandboxLostError(operation, "the guest answered nonsense")
                if len(content) > limit:
                    raise UsageError(
                        operation,
                        f"more than {limit >> 20} MiB would be held in memory",
                        "Read a file in pieces with offset and length, list a directory with `find`",
                    )
        except StreamReset as error:
            raise GuestError(operation, error.errno or 5, "read") from error
        return bytes(content)


def _read_request(
    path: GuestPath, operation: str, offset: int, length: int | None, *, follow: bool = True
) -> ReadRequest:
    check_number(operation, "offset", offset, MAX_NUMBER)
    check_number(operation, "length", 0 if length is None else length, MAX_NUMBER)
    return ReadRequest(
        path=encode_path(path, operation),
        offset=offset,
        length=-1 if length is None else length,
        follow=follow,
    )


def encode_path(path: GuestPath, operation: str) -> bytes:
    """Return an absolute path of the guest as its bytes. Raises UsageError for any other."""
    text = str(path)
    if not text.startswith("/") or "\0" in text:
        raise UsageError(operation, "a guest path is absolute and has no NUL", "Begin it with /")
    return os.fsencode(text)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _entries(listing: bytes) -> list[DirEntry]:
    entries = []
    position = 0
    while position < len(listing):
        (size,) = struct.unpack_from("<I", listing, position)
        position += 4
        if size > _ENTRY_LIMIT or position + size > len(listing):
            raise ValueError(f"an entry of {size} bytes")
        entry = decode(listing[position : position + size], DirEntry)
        if isinstance(entry, Failure):
            raise ValueError("an entry is a failure")
        position += size
        entries.append(entry)
    return entries


def _file_info(entry: DirEntry) -> FileInfo:
    return FileInfo(
        name=os.fsdecode(entry.name),
        type=entry.type,
        mode=entry.mode,
        size=entry.size,
        mtime_ns=entry.mtime_ns,
    )
