"""Finds out what a guest changed in a review mount, and copies it to the host.

The upper layer says where to look and what overlayfs knows (whiteouts, hidden and renamed directories); what counts as
a change is decided by comparing with the host's own directory. The guest's root can write anything into that layer:
it gets at most a change set that says so, in names that are single components, bounded in entries, depth and bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import stat
from pathlib import Path

from taskvm.errors import CopyError, GuestError, HostError
from taskvm.files import FileInfo, Files
from taskvm.fs.hostpaths import PERMISSIONS, HostPaths, Seen
from taskvm.review.changes import Change, ChangeSet, Item, Kind
from taskvm.review.guarded import guard_of
from taskvm.review.mounted import ReviewMount
from taskvm.treecopy import MAX_DEPTH, CopyLimits, Room
from taskvm.vm.rundir import RunDir
from taskvm.wire.control import FileType, Mark

# What is copied of a change set: a person looks at it, and a temporary directory holds it.
CHANGE_LIMITS = CopyLimits(max_entries=200_000, max_bytes=4 * 1024**3)
# Files are copied side by side: each costs two round trips, which overlap.
_AT_ONCE = 8
_COMPARE_BYTES = 1024 * 1024
_SET_IDS = stat.S_ISUID | stat.S_ISGID
_GONE = (2, 20, 116)  # ENOENT, ENOTDIR, ESTALE: the guest was still at work
_HOST_CHANGED = "the host changed it after the sandbox began"
_HIDDEN = "the host has that name hidden from the guest"
_HOST_DELETED = "the host deleted it after the sandbox began"
_TYPES: dict[int, FileType] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFBLK: "block",
    stat.S_IFCHR: "char",
}


async def take_changes(files: Files, mount: ReviewMount, limits: CopyLimits) -> ChangeSet:
    """Return the changes in `mount`. Raises as Survey.run; nothing is left behind then."""
    # A directory of this process, as a sandbox has one: whoever starts next removes it when this one was killed.
    staging = RunDir.create(f"changes-{secrets.token_hex(6)}")
    try:
        items = await Survey(files, mount, staging.path, limits).run()
    except BaseException:
        staging.remove()
        raise
    return ChangeSet(mount, staging, items)


class Survey:
    """One look at `mount`; copies go to `staging`."""

    def __init__(self, files: Files, mount: ReviewMount, staging: Path, limits: CopyLimits) -> None:
        self._files = files
        self._mount = mount
        self._staging = staging
        self._limits = limits
        self._operation = f"take the changes in {mount.path}"
        self._room = Room(staging, self._operation)
        self._tree = HostPaths(mount.provider.open_root())
        self._items: dict[str, Item] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._entries = 0
        self._copies = 0
        self._bytes = 0

    async def run(self) -> list[Item]:
        """Return the changes in order of their paths. Raises CopyError beyond the limits, GuestError, HostError."""
        try:
            async with asyncio.TaskGroup() as copying:
                await self._directory(copying, "", whole=False, depth=0)
            return [self._guarded(self._items[path]) for path in sorted(self._items)]
        except BaseExceptionGroup as group:
            first = group.exceptions[0]  # the others followed from it
            if not isinstance(first, OSError):
                raise first from None
            raise HostError(
                self._operation,
                f"{first.strerror or first} ({first.filename!r})",
                "Look at the host's directory, and at the disk of its temporary files",
            ) from first
        finally:
            self._tree.close()

    # Walking.

    async def _directory(
        self,
        copying: asyncio.TaskGroup,
        path: str,
        *,
        whole: bool,
        depth: int,
    ) -> None:
        """Compare a directory; `whole` when the guest's listing is complete and hides all the host has there."""
        if depth == MAX_DEPTH:
            raise self._too_much(f"{path!r} is more than {MAX_DEPTH} directories deep")
        entries = await self._list(path)
        self._entries += len(entries)  # before there is a task for each
        if self._entries > self._limits.max_entries:
            raise self._too_much(f"there are more than {self._limits.max_entries}")
        if whole:
            kept = {entry.name for entry, _ in entries}
            for name in self._host_names(path):
                if name not in kept:
                    self._delete(_join(path, name))
        for entry, mark in entries:
            below = _join(path, entry.name)
            if mark == "whiteout":
                self._delete(below)
            elif entry.type == "dir":
                await self._subdirectory(copying, below, entry, mark, whole, depth)
            else:
                copying.create_task(self._leaf(below, entry, mark))

    async def _subdirectory(
        self,
        copying: asyncio.TaskGroup,
        path: str,
        entry: FileInfo,
        mark: Mark | None,
        whole: bool,
        depth: int,
    ) -> None:
        seen = self._tree.see(path)
        if seen is None or seen.kind != stat.S_IFDIR:
            self._remove_for(path, seen)
            self._add(path, "added" if seen is None else "type", entry, seen, mark)
            whole = True
        elif entry.mode & PERMISSIONS != seen.permissions:
            self._add(path, "mode", entry, seen)
        if mark == "redirect":
            # Else it would lose the files that were only renamed, as soon as their old names are deleted on the host.
            await self._files.settle_layer(f"{self._mount.path}/{path}")
        whole = whole or mark in ("opaque", "redirect")
        await self._directory(copying, path, whole=whole, depth=depth + 1)

    async def _list(self, path: str) -> list[tuple[FileInfo, Mark | None]]:
        try:
            return await self._files.list_layer(self._guest_path(path))
        except GuestError as error:
            if path and error.errno in _GONE:
                return []
            raise

    def _host_names(self, path: str) -> list[str]:
        seen = self._tree.see(path)
        return self._tree.names(path) if seen is not None and seen.kind == stat.S_IFDIR else []

    # Deciding.

    async def _leaf(self, path: str, entry: FileInfo, mark: Mark | None) -> None:
        async with self._slots:
            seen = self._tree.see(path)
            try:
                if entry.type == "file" and not entry.mode & _SET_IDS:
                    await self._file(path, entry, mark, seen)
                elif entry.type == "symlink":
                    await self._symlink(path, entry, mark, seen)
                else:
                    what = "setuid or setgid" if entry.type == "file" else f"a {entry.type}"
                    self._leave(path, entry, seen, f"it is {what}")
            except GuestError as error:
                if error.errno not in _GONE:
                    raise

    async def _file(self, path: str, entry: FileInfo, mark: Mark | None, seen: Seen | None) -> None:
        content = await self._copy(self._guest_path(path), entry.size)
        if content is None:
            self._leave(path, entry, seen, "it has more bytes than are taken")
            return
        if seen is None or seen.kind != stat.S_IFREG:
            self._remove_for(path, seen)
            self._add(path, "added" if seen is None else "type", entry, seen, mark, content)
            return
        if await asyncio.to_thread(self._differs, path, content):
            self._add(path, "modified", entry, seen, mark, content)
            return
        content.unlink()
        if entry.mode & PERMISSIONS != seen.permissions:
            self._add(path, "mode", entry, seen, mark)

    async def _symlink(
        self, path: str, entry: FileInfo, mark: Mark | None, seen: Seen | None
    ) -> None:
        target = await self._files.readlink(self._guest_path(path))
        if seen is None or seen.kind != stat.S_IFLNK:
            self._remove_for(path, seen)
            kind: Kind = "added" if seen is None else "type"
            self._add(path, kind, entry, seen, mark, target=target)
        elif self._tree.target(path) != target:
            self._add(path, "modified", entry, seen, mark, target=target)

    def _delete(self, path: str) -> None:
        """Note the deletion of what the host has at `path`, each file below it too."""
        seen = self._tree.see(path)
        if seen is None or self._mount.hides(path):
            return
        self._remove_for(path, seen)
        self._note(
            Item(
                change=Change(
                    path=path,
                    kind="deleted",
                    type=_TYPES[seen.kind],
                    mode=seen.permissions,
                    size=seen.size,
                    conflict=self._conflict(path, seen),
                ),
                seen=seen,
            )
        )

    def _remove_for(self, path: str, seen: Seen | None) -> None:
        """Note the deletion of what is in the host's directory `path`, which something else replaces."""
        if seen is not None and seen.kind == stat.S_IFDIR:
            for name in self._tree.names(path):
                self._delete(_join(path, name))

    def _add(
        self,
        path: str,
        kind: Kind,
        entry: FileInfo,
        seen: Seen | None,
        mark: Mark | None = None,
        content: Path | None = None,
        *,
        target: str | None = None,
    ) -> None:
        conflict = ""
        if seen is None:
            if mark == "copied" and self._has_lost_names(path):
                conflict = _HOST_DELETED
        else:
            conflict = self._conflict(path, seen)
        change = Change(
            path=path,
            kind=kind,
            type=entry.type,
            mode=entry.mode & PERMISSIONS,
            size=entry.size,
            target=target,
            conflict=conflict,
        )
        self._note(Item(change=change, seen=seen, content=content))

    def _conflict(self, path: str, seen: Seen) -> str:
        # A directory's times move with what is in it, and each of that is judged by itself.
        is_dir = seen.kind == stat.S_IFDIR
        return _HOST_CHANGED if not is_dir and self._mount.has_changed(path, seen) else ""

    def _has_lost_names(self, path: str) -> bool:
        """Say whether the host may have removed `path`. If not, the guest renamed something to it."""
        while path:
            path = path.rpartition("/")[0]
            seen = self._tree.see(path)
            if seen is not None:
                return self._mount.has_changed(path, seen)
        return False

    def _leave(self, path: str, entry: FileInfo, seen: Seen | None, refusal: str) -> None:
        change = Change(
            path=path,
            kind="added" if seen is None else "type" if entry.type != "file" else "modified",
            type=entry.type,
            mode=entry.mode & PERMISSIONS,
            size=entry.size,
            refusal=refusal,
        )
        self._note(Item(change=change, seen=seen))

    def _note(self, item: Item) -> None:
        if len(self._items) >= self._limits.max_entries:
            raise self._too_much(f"there are more than {self._limits.max_entries}")
        if self._mount.hides(item.change.path):
            # Not even compared: a diff would show the guest's reviewer what was to be hidden.
            change = dataclasses.replace(item.change, refusal=_HIDDEN)
            item = Item(change=change, seen=item.seen)
        self._items[item.change.path] = item

    def _guarded(self, item: Item) -> Item:
        change = item.change
        guard = guard_of(change.path, kind=change.type, has=self._will_have, target=change.target)
        return (
            dataclasses.replace(item, change=dataclasses.replace(change, guard=guard))
            if guard
            else item
        )

    def _will_have(self, path: str) -> bool:
        item = self._items.get(path)
        return item.change.kind != "deleted" if item else self._tree.see(path) is not None

    # Copying.

    async def _copy(self, path: str, size: int) -> Path | None:
        """Copy a file of the guest's; None when it has more bytes than may still be taken."""
        if size > self._limits.max_bytes - self._bytes:
            return None
        self._copies += 1
        copy = self._staging / str(self._copies)
        with copy.open("xb") as file:
            async with contextlib.aclosing(self._files.open_read(path, follow=False)) as pieces:
                async for piece in pieces:
                    self._room.take(len(piece))
                    self._bytes += len(piece)
                    if self._bytes > self._limits.max_bytes:
                        break
                    file.write(piece)
                else:
                    return copy
        copy.unlink()
        return None

    def _differs(self, path: str, copy: Path) -> bool:
        with self._tree.reading(path) as old, copy.open("rb") as new:
            while True:
                before, after = old.read(_COMPARE_BYTES), new.read(_COMPARE_BYTES)
                if before != after:
                    return True
                if not before:
                    return False

    def _guest_path(self, path: str) -> str:
        return f"{self._mount.upper}/{path}"

    def _too_much(self, cause: str) -> CopyError:
        return CopyError(self._operation, cause, "Look into the guest, or raise the limits")


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
