"""Files of the guest, for programs that block."""

from __future__ import annotations

import builtins
import os
from collections.abc import Generator, Iterable

from taskvm import files as aio
from taskvm import filewatch as aio_filewatch
from taskvm.files import FileInfo, GuestPath
from taskvm.sync.bridge import Bridge, Call
from taskvm.sync.filewatch import FileWatch
from taskvm.treecopy import CopyLimits


class Files:
    """The files of one sandbox. Paths are absolute; names that are not UTF-8 appear with surrogate escapes.

    Everything raises GuestError with the guest's errno when the guest refuses (ETIMEDOUT when it does not come to an
    end), SandboxLostError when it is gone or no longer answers, and UsageError for a path that is not absolute. New
    files belong to the sandbox's user. Threads may share it.
    """

    def __init__(self, bridge: Bridge, files: aio.Files) -> None:
        self._bridge = bridge
        self._files = files

    def read_bytes(self, path: GuestPath, *, offset: int = 0, length: int | None = None) -> bytes:
        """Return the content of a file, or `length` bytes of it from `offset` on (fewer at its end).

        Raises UsageError when that is more than MAX_READ_BYTES.
        """
        return self._bridge.call(self._files.read_bytes, path, offset=offset, length=length)

    def read_text(self, path: GuestPath) -> str:
        """Return the content of a UTF-8 file. Raises UnicodeDecodeError when it is not UTF-8."""
        return self._bridge.call(self._files.read_text, path)

    def open_read(
        self,
        path: GuestPath,
        *,
        offset: int = 0,
        length: int | None = None,
        follow: bool = True,
    ) -> Generator[bytes, None, None]:
        """Yield the content of a file of any size in pieces; the guest reads no further ahead than a window.

        Without `follow` a symbolic link is an error (ELOOP). Leave early by `contextlib.closing`: an open one
        counts among the MAX_CONCURRENT operations.
        """
        pieces = self._files.open_read(path, offset=offset, length=length, follow=follow)

        async def piece() -> bytes | None:
            return await anext(pieces, None)

        try:
            while (data := self._bridge.call(piece)) is not None:
                yield data
        finally:
            # Not waited for: a forgotten generator is closed by the collector, in whatever thread it runs.
            self._bridge.leave(pieces.aclose)

    def write_bytes(
        self, path: GuestPath, data: bytes, *, mode: int | None = None, parents: bool = True
    ) -> None:
        """Replace a file's content in one step: a reader sees the old content or the new."""
        self._bridge.call(self._files.write_bytes, path, data, mode=mode, parents=parents)

    def write_stream(
        self,
        path: GuestPath,
        pieces: Iterable[bytes],
        *,
        mode: int | None = None,
        parents: bool = True,
        mtime_ns: int | None = None,
    ) -> None:
        """Replace a file's content as `write_bytes`, by pieces that together may be larger than memory.

        A piece is asked for, in this thread, when the guest has room for it. When `pieces` raises, or this is
        interrupted, the old content stays. `mtime_ns` sets the time of modification.
        """
        call = Call(self._bridge)
        call.run(
            self._files.write_stream,
            path,
            call.stream(pieces),
            mode=mode,
            parents=parents,
            mtime_ns=mtime_ns,
        )

    def write_text(
        self, path: GuestPath, text: str, *, mode: int | None = None, parents: bool = True
    ) -> None:
        """Replace a file's content with `text` in UTF-8, in one step."""
        self._bridge.call(self._files.write_text, path, text, mode=mode, parents=parents)

    def stat(self, path: GuestPath, *, follow: bool = True) -> FileInfo:
        """Return what `path` is; with `follow` what a symbolic link leads to."""
        return self._bridge.call(self._files.stat, path, follow=follow)

    def exists(self, path: GuestPath) -> bool:
        """Return whether `path` is there, following symbolic links."""
        return self._bridge.call(self._files.exists, path)

    def list(self, path: GuestPath) -> builtins.list[FileInfo]:
        """Return the entries of a directory, sorted by name."""
        return self._bridge.call(self._files.list, path)

    def mkdir(self, path: GuestPath, *, parents: bool = False, mode: int = 0o755) -> None:
        """Make a directory; with `parents` also those above it, and one that is there is no error."""
        self._bridge.call(self._files.mkdir, path, parents=parents, mode=mode)

    def chmod(self, path: GuestPath, mode: int) -> None:
        """Set the low 12 bits of the mode. A symbolic link is not followed but refused (ELOOP)."""
        self._bridge.call(self._files.chmod, path, mode)

    def symlink(self, target: GuestPath, path: GuestPath) -> None:
        """Make `path` a symbolic link that holds `target`, which may be relative. What is at `path` stays: EEXIST."""
        self._bridge.call(self._files.symlink, target, path)

    def readlink(self, path: GuestPath) -> str:
        """Return what the symbolic link `path` holds: any text, which may lead anywhere."""
        return self._bridge.call(self._files.readlink, path)

    def copy_in(self, host_path: str | os.PathLike[str], guest_path: GuestPath) -> None:
        """Copy a file, a symbolic link or a whole tree of the host to `guest_path`, which is the copy's own name.

        Permissions, the files' times and symbolic links (never followed) are kept; setuid, setgid and sticky are not.
        Files that exist are replaced, directories that exist are added to. A failure leaves what was copied until
        then. Raises CopyError for a socket, FIFO or device, or a tree that is too deep.
        """
        self._bridge.call(self._files.copy_in, host_path, guest_path)

    def copy_out(
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
        self._bridge.call(self._files.copy_out, guest_path, host_path, limits=limits)

    def watch(self, path: GuestPath, *, recursive: bool = False) -> FileWatch:
        """Watch a file, a directory or, with `recursive`, all below it; the result is closed by leaving `with`.

            with vm.files.watch("/work", recursive=True) as changes:
                for change in changes: ...

        From then on every change that a program of the guest makes is told, in order. A directory that appears is
        watched from when it was seen, and what is in it by then is told as created, perhaps twice. Symbolic links are
        followed in `path` only. A watch keeps no sandbox awake. At most MAX_WATCHES are open at a time (UsageError).
        """

        async def watch() -> aio_filewatch.FileWatch:
            return await self._files.watch(path, recursive=recursive)

        call = Call(self._bridge, undo=aio_filewatch.FileWatch.close)
        return FileWatch(self._bridge, call.run(watch))

    def rename(self, path: GuestPath, to: GuestPath, *, replace: bool = True) -> None:
        """Rename `path` to `to` within one file system; without `replace` an existing `to` is EEXIST."""
        self._bridge.call(self._files.rename, path, to, replace=replace)

    def remove(self, path: GuestPath, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file or an empty directory; with `recursive` a whole tree. Symbolic links are not followed."""
        self._bridge.call(self._files.remove, path, recursive=recursive, missing_ok=missing_ok)
