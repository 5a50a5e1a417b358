"""What a guest changed in a review mount: a set that is looked at, and applied to the host's files.

Rule 1: the set is a copy, taken once. What is applied is what was looked at, whatever the guest does meanwhile, and
    also when the sandbox is gone.
Rule 2: a file of the host that changed since the guest may have looked at it, or since the set was taken, stays.
Rule 3: what the host would run or obey by itself (`guarded`) is applied only when that is asked for; a device, FIFO,
    socket or set-id file never.
Rule 4: each file appears whole or not at all; one that fails stops no other.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from taskvm.errors import SandboxStateError, UsageError
from taskvm.fs.hostpaths import ChangedError, HostPaths, Seen
from taskvm.printing import printable
from taskvm.review.mounted import ReviewMount
from taskvm.review.patch import MAX_DIFF_BYTES, Version, render_patch
from taskvm.vm.rundir import RunDir
from taskvm.wire.control import FileType

Kind = Literal["added", "modified", "deleted", "mode", "type"]
Status = Literal["applied", "conflict", "guarded", "refused", "failed"]
# How a text diff is made of a link, as git does it.
_LINK_MODE = 0o120000
_FILE_MODE = 0o100644
_EXECUTABLE_MODE = 0o100755


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One path, relative to the mount, that the guest left other than the host has it.

    `kind`: "mode" when only permissions differ, "type" when a file became a directory or the like. `type`, `mode`
    and `size` are what the guest has, or of a deleted path what the host has; `target` is a link's. `conflict`,
    `guard` and `refusal` say why it is not applied: the host changed it too (`force` applies it), the host would run
    or obey it (`guarded` does), or never.
    """

    path: str
    kind: Kind
    type: FileType
    mode: int
    size: int
    target: str | None = None
    conflict: str = ""
    guard: str = ""
    refusal: str = ""

    @property
    def obstacle(self) -> str:
        """The first reason why it would not be applied just so, or ""."""
        return self.refusal or self.guard or self.conflict

    def __str__(self) -> str:
        """One line for people: control characters are escaped."""
        name = printable(self.path) + ("/" if self.type == "dir" else "")
        arrow = f" -> {printable(self.target)}" if self.target is not None else ""
        reason = f"  [{self.obstacle}]" if self.obstacle else ""
        return f"{self.kind:8}  {name}{arrow}{reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one change. `reason` says why it was not applied."""

    path: str
    status: Status
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A change with what it begins from on the host, and the copy of its content."""

    change: Change
    seen: Seen | None = None
    content: Path | None = None


class ChangeSet:
    """The changes of one review mount, in order of their paths. Close it, or use it with `with`: it holds copies.

    Its methods read and write files of the host and block meanwhile; they need no sandbox.
    """

    def __init__(
        self,
        mount: ReviewMount,
        staging: RunDir,
        items: Iterable[Item],
    ) -> None:
        self.root: Path = mount.provider.path
        self._mount = mount
        self._remove_copies = weakref.finalize(self, staging.remove)  # if nobody closes it, too
        self._items = {item.change.path: item for item in items}
        self._tree = HostPaths(mount.provider.open_root())
        self._applied: set[str] = set()
        self._closed = False

    def __iter__(self) -> Iterator[Change]:
        return iter([item.change for item in self._items.values()])

    def __len__(self) -> int:
        return len(self._items)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the copies. Idempotent."""
        self._closed = True
        self._tree.close()
        self._remove_copies()

    def read(self, path: str) -> bytes:
        """Return the new content of the file `path`. Raises UsageError when the set holds none."""
        item = self._items.get(path)
        if item is None or item.content is None:
            raise UsageError(
                f"read the changed file {printable(path)}",
                "the set holds no content of it",
                "Name a file that was added or modified",
            )
        self._require_open("read a changed file")
        return item.content.read_bytes()

    def diff(
        self,
        paths: Iterable[str] | None = None,
        *,
        binary: bool = False,
        max_bytes: int = MAX_DIFF_BYTES,
    ) -> str:
        """Return a unified diff in git's format against what the host has now, for `paths` or everything.

        Deletions come first. A binary file is noted, or with `binary` written out, so that `git apply` takes the
        patch. Text that is not UTF-8 has surrogate escapes. What passes `max_bytes` is replaced by a line that says
        so. Write it to a terminal with `printable` only: the guest chose every character.
        """
        self._require_open("show the changes")
        parts: list[str] = []
        left = max_bytes
        items = self._selected(paths)
        for number, item in enumerate(
            sorted(items, key=lambda item: item.change.kind != "deleted")
        ):
            text = render_patch(item.change.path, *self._versions(item), binary=binary)
            left -= len(text)
            if left < 0:
                parts.append(f"# {len(items) - number} more changes are not shown here\n")
                break
            parts.append(text)
        return "".join(parts)

    def apply(
        self, paths: Iterable[str] | None = None, *, force: bool = False, guarded: bool = False
    ) -> list[Outcome]:
        """Make the host's directory like the guest's, for `paths` (a directory's stands for all below) or everything.

        Returns what became of each change. `force` applies over what the host changed before the set was taken,
        `guarded` applies what the host would run or obey. Raises UsageError for a path that is not in the set.
        """
        self._require_open("apply the changes")
        items = self._selected(paths)
        deleted = [item for item in items if item.change.kind == "deleted"]
        others = [item for item in items if item.change.kind != "deleted"]
        # The deepest first, so that a directory is empty when its turn comes; then from the top.
        deleted.sort(key=lambda item: item.change.path.count("/"), reverse=True)
        outcomes = [self._apply(item, force=force, guarded=guarded) for item in (*deleted, *others)]
        return sorted(outcomes, key=lambda outcome: outcome.path)

    # How.

    def _selected(self, paths: Iterable[str] | None) -> list[Item]:
        """Return the items that `paths` name, with the directories they need."""
        if paths is None:
            return list(self._items.values())
        chosen: set[str] = set()
        for path in (text.strip("/") for text in paths):
            below = [one for one in self._items if one == path or one.startswith(f"{path}/")]
            if not below:
                raise UsageError(
                    f"choose the change {printable(path)}",
                    "the set has none there",
                    "Name paths as the set does, relative to the mount",
                )
            chosen.update(below, filter(self._is_new_directory, _above(path)))
        return [item for path, item in self._items.items() if path in chosen]

    def _is_new_directory(self, path: str) -> bool:
        item = self._items.get(path)
        return item is not None and item.change.type == "dir" and item.change.kind != "deleted"

    def _apply(self, item: Item, *, force: bool, guarded: bool) -> Outcome:
        change = item.change
        if change.path in self._applied:
            return Outcome(path=change.path, status="applied")
        if change.refusal:
            return Outcome(path=change.path, status="refused", reason=change.refusal)
        if change.guard and not guarded:
            return Outcome(path=change.path, status="guarded", reason=change.guard)
        if change.conflict and not force:
            return Outcome(path=change.path, status="conflict", reason=change.conflict)
        try:
            seen = self._write(item)
        except ChangedError:
            reason = "the host changed it after the set was taken"
            return Outcome(path=change.path, status="conflict", reason=reason)
        except OSError as error:
            reason = error.strerror or str(error)
            return Outcome(path=change.path, status="failed", reason=reason)
        self._applied.add(change.path)
        self._remember(change.path, seen)
        return Outcome(path=change.path, status="applied")

    def _write(self, item: Item) -> Seen | None:
        change, seen = item.change, item.seen
        if change.kind == "deleted":
            assert seen is not None, "what was deleted had been seen"
            self._tree.remove(change.path, seen)
            return None
        if change.kind == "mode":
            # A directory's other times moved with what was changed in it.
            expected = None if change.type == "dir" else seen
            return self._tree.chmod(change.path, change.mode, expected)
        if seen is not None and stat.S_IFDIR in (seen.kind, _kind_of(change.type)):
            self._tree.remove(change.path, seen)
            seen = None
        if change.type == "dir":
            return self._tree.mkdir(change.path, change.mode)
        if change.type == "symlink":
            assert change.target is not None, "a link holds something"
            return self._tree.link(change.path, change.target, seen)
        assert item.content is not None, "a file that is not refused was copied"
        with item.content.open("rb") as content:
            return self._tree.write(change.path, content, change.mode, seen)

    def _remember(self, path: str, seen: Seen | None) -> None:
        """Note what is there and in the directory above by our own doing, so that it is no conflict later."""
        above = path.rpartition("/")[0]
        directory = self._tree.see(above)
        for place, now in ((path, seen), (above, directory)):
            if now is not None:
                self._mount.applied[place] = now

    def _versions(self, item: Item) -> tuple[Version | None, Version | None]:
        """Return what the host has and what it would have, as a patch shows them; None for nothing or a directory."""
        change = item.change
        old = self._on_host(change.path)
        if change.kind == "deleted":
            return old, None
        if change.kind == "mode":
            return old, old and dataclasses.replace(old, mode=_git_mode(change.mode))
        if change.target is not None:
            return old, Version(_LINK_MODE, os.fsencode(change.target))
        if item.content is None:
            return None, None
        size = item.content.stat().st_size
        content = item.content.read_bytes() if size <= MAX_DIFF_BYTES else None
        return old, Version(_git_mode(change.mode), content)

    def _on_host(self, path: str) -> Version | None:
        seen = self._tree.see(path)
        if seen is not None and seen.kind == stat.S_IFLNK:
            return Version(_LINK_MODE, os.fsencode(self._tree.target(path)))
        if seen is None or seen.kind != stat.S_IFREG:
            return None
        try:
            with self._tree.reading(path) as file:
                content = file.read(MAX_DIFF_BYTES + 1)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.ENOENT):
                raise
            content = b""
        return Version(_git_mode(seen.mode), content if len(content) <= MAX_DIFF_BYTES else None)

    def _require_open(self, operation: str) -> None:
        if self._closed:
            raise SandboxStateError(operation, "the set was closed", "Take another")


def _above(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _git_mode(mode: int) -> int:
    return _EXECUTABLE_MODE if mode & stat.S_IXUSR else _FILE_MODE


def _kind_of(file_type: FileType) -> int:
    return {"dir": stat.S_IFDIR, "symlink": stat.S_IFLNK}.get(file_type, stat.S_IFREG)
