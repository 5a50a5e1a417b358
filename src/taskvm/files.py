"""Files of the guest, on its own disk or on a mount, over the control port. Runs beside execs and beside itself."""

from __future__ import annotations

import asyncio
import os
import struct
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

from taskvm.errors import GuestError, SandboxLostError, UsageError
from taskvm.port import StreamReset
from taskvm.vm.control import Call, Control
from taskvm.wire.control import (
    AnswerError,
    DirEntry,
    Done,
    Failure,
    FileStat,
    FileType,
    ListRequest,
    MkdirRequest,
    ReadRequest,
    ReadStarted,
    RemoveRequest,
    RenameRequest,
    Request,
    StatRequest,
    WriteRequest,
    Written,
    decode,
)

GuestPath = str | PurePosixPath
_A = TypeVar("_A", FileStat, Done)

# The agent serves this many operations at once (protocol page); further ones wait here.
MAX_CONCURRENT = 32
# read_bytes refuses more than this: it would be held in the host's memory.
MAX_READ_BYTES = 256 * 1024 * 1024
# A listing becomes objects, five times its size: this is about 200 000 entries.
MAX_LISTING_BYTES = 16 * 1024 * 1024
# An fsync of a large file on a slow disk.
WRITE_TIMEOUT_S = 300.0
_NOT_FOUND = 2  # ENOENT in linux/errno-base.h
_CANCELLED = 125  # ECANCELED in linux/errno.h: the host no longer wants it
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

    Everything raises GuestError with the guest's errno when the guest refuses, SandboxLostError when it is gone, and
    UsageError for a path that is not absolute. New files belong to the sandbox's user.
    """

    def __init__(self, control: Control, uid: int, gid: int) -> None:
        self._control = control
        self._uid = uid
        self._gid = gid
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def read_bytes(
        self, path: GuestPath, *, offset: int = 0, length: int | None = None
    ) -> bytes:
        """Return the content of a file, or `length` bytes of it from `offset` on (fewer at its end).

        Raises UsageError when that is more than MAX_READ_BYTES.
        """
        operation = f"read {path}"
        request = ReadRequest(
            path=_encoded(path, operation), offset=offset, length=-1 if length is None else length
        )
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

    async def write_bytes(
        self, path: GuestPath, data: bytes, *, mode: int = 0o644, parents: bool = True
    ) -> None:
        """Replace a file's content in one step: a reader sees the old content or the new.

        The bytes go to a temporary file beside it, which is synced and renamed over it.
        """
        operation = f"write {path}"
        request = WriteRequest(
            path=_encoded(path, operation),
            mode=mode,
            uid=self._uid,
            gid=self._gid,
            parents=parents,
        )
        async with self._slots:
            call = self._control.open_call(request, operation)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_send(call, data))
                    written = await call.answer(Written, WRITE_TIMEOUT_S)
                    call.outlet.fail(BrokenPipeError())
            except BaseExceptionGroup as group_error:
                call.forget(errno=_CANCELLED)
                raise group_error.exceptions[0] from None
            finally:
                call.forget()
        if written.size != len(data):
            raise SandboxLostError(
                operation, f"the guest wrote {written.size} of {len(data)} bytes"
            )

    async def write_text(
        self, path: GuestPath, text: str, *, mode: int = 0o644, parents: bool = True
    ) -> None:
        """Replace a file's content with `text` in UTF-8, in one step."""
        await self.write_bytes(path, text.encode("utf-8"), mode=mode, parents=parents)

    async def stat(self, path: GuestPath, *, follow: bool = True) -> FileInfo:
        """Return what `path` is; with `follow` what a symbolic link leads to."""
        operation = f"stat {path}"
        request = StatRequest(path=_encoded(path, operation), follow=follow)
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
        operation = f"list {path}"
        request = ListRequest(path=_encoded(path, operation))
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
        request = MkdirRequest(
            path=_encoded(path, operation),
            mode=mode,
            uid=self._uid,
            gid=self._gid,
            parents=parents,
        )
        await self._request(request, Done, operation)

    async def rename(self, path: GuestPath, to: GuestPath, *, replace: bool = True) -> None:
        """Rename `path` to `to` within one file system; without `replace` an existing `to` is EEXIST."""
        operation = f"rename {path} to {to}"
        request = RenameRequest(
            path=_encoded(path, operation), to=_encoded(to, operation), replace=replace
        )
        await self._request(request, Done, operation)

    async def remove(
        self, path: GuestPath, *, recursive: bool = False, missing_ok: bool = False
    ) -> None:
        """Remove a file or an empty directory; with `recursive` a whole tree. Symbolic links are not followed."""
        operation = f"remove {path}"
        request = RemoveRequest(
            path=_encoded(path, operation), recursive=recursive, missing_ok=missing_ok
        )
        await self._request(request, Done, operation)

    async def _request(self, request: Request, kind: type[_A], operation: str) -> _A:
        async with self._slots:
            return await self._control.request(request, kind, operation, WRITE_TIMEOUT_S)

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


def _encoded(path: GuestPath, operation: str) -> bytes:
    text = str(path)
    if not text.startswith("/") or "\0" in text:
        raise UsageError(operation, "a guest path is absolute and has no NUL", "Begin it with /")
    return os.fsencode(text)


async def _send(call: Call, data: bytes) -> None:
    try:
        await call.outlet.write(data)
        call.outlet.end()
    except (BrokenPipeError, StreamReset):
        return  # the guest has answered before it read everything: its answer says why


def _entries(listing: bytes) -> list[FileInfo]:
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
        entries.append(
            FileInfo(
                name=os.fsdecode(entry.name),
                type=entry.type,
                mode=entry.mode,
                size=entry.size,
                mtime_ns=entry.mtime_ns,
            )
        )
    return entries
