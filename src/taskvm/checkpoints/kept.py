"""The disks that sandboxes were resumed from, under names of our own: a user's name may go, or become another disk's.

QEMU opens what lies beneath a disk by its name whenever a sandbox is forked, and we read it whenever one is saved.

    kept/<key>/disk.qcow2        a hard link to the checkpoint's disk; a copy where none can be made
               source.json       where that checkpoint is, so that this goes when it has gone

Rule 1: whoever uses a disk holds its directory (`taskvm.paths.hold`). What is held stays.
Rule 2: the others go when their checkpoint has gone: when it is removed, and at the next start from a new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from taskvm.checkpoints.checkpointfile import Saved, copy_disk, note_verified, verify_checkpoint
from taskvm.errors import CheckpointError, HostError
from taskvm.paths import Removed, cache_dir, hold_new, measure, private_dir, replace_file, seized
from taskvm.vm.disk import check_room
from taskvm.vm.template import FileMark, mark_file

# There, or of another user, or linked too often: then it is copied.
_NO_LINKS = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP})


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a kept disk is from. `copied` is None for a link, else what tells that source and copy are as they were."""

    path: str
    copied: tuple[FileMark, FileMark] | None = None


def kept_base() -> Path:
    """Return the directory of all kept disks."""
    return private_dir(cache_dir() / "kept")


def keep_disk(saved: Saved, *, spare_bytes: int = 0) -> Path:
    """Verify the disk of a checkpoint, and return a name of it that stays while its directory is held.

    A copy leaves `spare_bytes` of the host's disk free. Raises CheckpointError, HostError.
    """
    mark = verify_checkpoint(saved)
    directory, held = hold_new(lambda: private_dir(kept_base() / saved.key))
    try:
        disk, source = directory / "disk.qcow2", saved.disk.resolve()
        if not _is_current(directory, source, mark):
            _link_or_copy(saved, mark, directory, spare_bytes)
            for _ in forget_disks():
                pass  # as many as come, go
    except OSError as error:
        raise HostError(
            f"use the checkpoint {saved.path}",
            error.strerror or str(error),
            "Start again; if the disk is full, free some of it",
        ) from error
    finally:
        os.close(held)
    return disk


def forget_disks(base: Path | None = None) -> Iterator[Removed]:
    """Remove the disks of `base` whose checkpoint is gone and that nobody uses."""
    for directory in sorted((base or kept_base()).glob("*")):
        trash = directory.with_name(f".{directory.name.lstrip('.')}")
        with contextlib.suppress(OSError):  # another was faster; what cannot be removed stays
            with seized(directory) as free:
                if free and directory != trash and not _is_orphan(directory):
                    _remove_unfinished(directory)
                    continue
                if not free:
                    continue
                size = measure(directory)
                if directory != trash:
                    shutil.rmtree(trash, ignore_errors=True)
                    directory.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)
            yield Removed(f"disk of the checkpoint {trash.name[1:13]}", size)


def _link_or_copy(saved: Saved, mark: FileMark, directory: Path, spare_bytes: int) -> None:
    source, new, disk = (
        saved.disk.resolve(),
        directory / f".{secrets.token_hex(4)}",
        directory / "disk.qcow2",
    )
    linked = _link(source, new)
    try:
        if not linked:
            check_room(new, mark.size, spare_bytes)
            copy_disk(source, new)
            new.chmod(0o400)
            verify_checkpoint(Saved(path=new, facts=saved.facts), note=False)
        new.rename(disk)
    finally:
        new.unlink(missing_ok=True)
    now = mark_file(disk)
    if linked:
        # A new name changes nothing but the time of the change.
        if (now.inode, now.size, now.mtime_ns) != (mark.inode, mark.size, mark.mtime_ns):
            raise CheckpointError(
                f"use the checkpoint {saved.path}", "another was put in its place", "Start again"
            )
        note_verified(saved, now)
    known = Source(path=str(source), copied=None if linked else (mark, now))
    replace_file(directory / "source.json", msgspec.json.encode(known))


def _link(source: Path, new: Path) -> bool:
    try:
        new.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def _is_current(directory: Path, source: Path, mark: FileMark) -> bool:
    """Whether the disk in `directory` is the one at `source`, which was verified as `mark`."""
    known = _read_source(directory)
    if known is None or known.path != str(source):
        return False
    with contextlib.suppress(FileNotFoundError):
        disk = directory / "disk.qcow2"
        if known.copied is None:
            return disk.samefile(source)
        return known.copied == (mark, mark_file(disk))
    return False


def _remove_unfinished(directory: Path) -> None:
    """Remove what somebody who was killed was copying; nobody is, since nobody holds the directory."""
    for left in directory.glob(".*"):
        left.unlink()


def _is_orphan(directory: Path) -> bool:
    known = _read_source(directory)
    if known is None:
        return True
    try:
        source = Path(known.path)
        if known.copied is None:
            return not source.samefile(directory / "disk.qcow2")
        return mark_file(source) != known.copied[0]
    except OSError:
        return True


def _read_source(directory: Path) -> Source | None:
    try:
        return msgspec.json.decode((directory / "source.json").read_bytes(), type=Source)
    except (OSError, msgspec.MsgspecError):
        return None
