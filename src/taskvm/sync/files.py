"""Files of the guest, for programs that block."""

from __future__ import annotations

import builtins

from taskvm import files as aio
from taskvm.files import FileInfo, GuestPath
from taskvm.sync.bridge import Bridge


class Files:
    """The files of one sandbox. Paths are absolute; names that are not UTF-8 appear with surrogate escapes.

    Everything raises GuestError with the guest's errno when the guest refuses, SandboxLostError when it is gone, and
    UsageError for a path that is not absolute. New files belong to the sandbox's user. Threads may share it.
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

    def write_bytes(
        self, path: GuestPath, data: bytes, *, mode: int = 0o644, parents: bool = True
    ) -> None:
        """Replace a file's content in one step: a reader sees the old content or the new."""
        self._bridge.call(self._files.write_bytes, path, data, mode=mode, parents=parents)

    def write_text(
        self, path: GuestPath, text: str, *, mode: int = 0o644, parents: bool = True
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

    def rename(self, path: GuestPath, to: GuestPath, *, replace: bool = True) -> None:
        """Rename `path` to `to` within one file system; without `replace` an existing `to` is EEXIST."""
        self._bridge.call(self._files.rename, path, to, replace=replace)

    def remove(self, path: GuestPath, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file or an empty directory; with `recursive` a whole tree. Symbolic links are not followed."""
        self._bridge.call(self._files.remove, path, recursive=recursive, missing_ok=missing_ok)
