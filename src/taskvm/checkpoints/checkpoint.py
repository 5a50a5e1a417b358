"""Saved sandboxes, which new ones start from, and the user's store of them.

checkpoint = await vm.checkpoint("dev-base")
async with Checkpoint.load("dev-base").resume(mounts={"/workspace": HostDir(".")}) as vm: ...
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack

from taskvm.checkpoints.checkpointfile import Saved, read_checkpoint
from taskvm.checkpoints.kept import forget_disks
from taskvm.checkpoints.saving import export_disk, import_disk
from taskvm.checkpoints.staging import store_dir, sweep_staged
from taskvm.errors import CheckpointError, UsageError
from taskvm.opening import Opening
from taskvm.options import ResumeArguments
from taskvm.paths import measure

if TYPE_CHECKING:
    from taskvm.sandbox import Sandbox

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")


class Checkpoint:
    """A saved sandbox. Any number of new ones can start from it, at the same time too.

    `path` is where it is, `name` its name there. `memory` says whether running programs are in it, or its disk alone.
    `image` is the digest of the image that its disk lies above, `sha256` that of the disk; `qemu_version` saved it.
    """

    def __init__(self, saved: Saved) -> None:
        self._saved = saved
        self.path: Path = saved.path
        self.name: str = saved.path.name
        self.memory: bool = saved.memory is not None
        self.image: str = saved.facts.image
        self.sha256: str = saved.facts.sha256
        self.qemu_version: str = saved.facts.qemu_version
        self.arch: str = saved.facts.arch
        self.cpus: int = saved.facts.cpus
        self.memory_mib: int = saved.facts.memory_mib
        self.created: str = saved.facts.created

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path} {'memory' if self.memory else 'disk'}>"

    @classmethod
    def load(cls, target: str | os.PathLike[str]) -> Self:
        """Return the checkpoint `target`: a name in the store, or a path (an os.PathLike, or a str with a slash).

        Raises CheckpointError when it is not there, damaged, or not to be trusted.
        """
        return cls(_read(target))

    @property
    def disk_bytes(self) -> int:
        """What it takes of the host's disk."""
        return measure(self.path)

    def resume(self, **options: Unpack[ResumeArguments]) -> Opening[Sandbox]:
        """Start a sandbox from it: `await` the result, or use it with `async with`.

        The options are those of `Sandbox.create`; what the saved sandbox had of them is not in a checkpoint. Clock,
        entropy, host name and machine id are fresh before any program runs on, and connections are broken off. The
        programs of a memory checkpoint go on with the placeholders that they know, and what they write to their
        standard output is dropped.

        Raises as `Sandbox.create`; CheckpointError when this host has another image, QEMU or processor than it needs.
        """
        from taskvm.sandbox import Sandbox  # it imports us

        return Sandbox.create(checkpoint=self, **options)

    def delete(self) -> None:
        """Remove it. Sandboxes that started from it run on. Idempotent. Raises CheckpointError."""
        _remove(self.path)


class CheckpointStore:
    """The checkpoints of this user that have names, in `$XDG_STATE_HOME/taskvm/checkpoints`."""

    def __init__(self) -> None:
        self.root: Path = store_dir()

    def names(self) -> Sequence[str]:
        """Return all names, also of those that cannot be read: `get` says why. What has no name of ours is not ours."""
        sweep_staged(self.root)
        return sorted(path.name for path in self.root.iterdir() if _NAME.match(path.name))

    def list(self) -> Iterator[Checkpoint]:
        """Return those that can be read, by name."""
        for name in self.names():
            with contextlib.suppress(CheckpointError):
                yield Checkpoint(read_checkpoint(self.root / name))

    def get(self, name: str) -> Checkpoint:
        """Return the checkpoint `name`. Raises CheckpointError, UsageError."""
        return Checkpoint(read_checkpoint(_existing(_named(name))))

    def export(self, name: str, path: str | os.PathLike[str]) -> Path:
        """Write the disk checkpoint `name` to the new file `path`, and return that.

        Raises CheckpointError for one with memory, which fits this host alone, or a file that is there.
        """
        target = Path(path).absolute()
        export_disk(read_checkpoint(_existing(_named(name))), target)
        return target

    def import_(self, path: str | os.PathLike[str], name: str) -> Checkpoint:
        """Take the disk checkpoint in the file `path` into the store, as `name`. It may come from anywhere.

        Raises CheckpointError for a file that is damaged, was changed, or names other files; HostError.
        """
        return Checkpoint(import_disk(_existing(Path(path).absolute()), _named(name)))

    def remove(self, name: str) -> None:
        """Remove the checkpoint `name`, readable or not. Raises CheckpointError when there is none."""
        _remove(_existing(_named(name)))


def find_checkpoint(target: Checkpoint | str | os.PathLike[str] | None) -> Saved | None:
    """Return the files of a checkpoint, checked anew; None of None. Raises CheckpointError, UsageError."""
    if target is None:
        return None
    return read_checkpoint(target.path) if isinstance(target, Checkpoint) else _read(target)


def checkpoint_path(target: str | os.PathLike[str]) -> Path:
    """Return where a checkpoint that a user names so is, or will be. Raises UsageError for a name that is none."""
    if isinstance(target, str) and "/" not in target:
        return _named(target)
    return Path(target).absolute()


def _read(target: str | os.PathLike[str]) -> Saved:
    return read_checkpoint(_existing(checkpoint_path(target)))


def _existing(path: Path) -> Path:
    if not path.exists():
        named = path.parent == store_dir()
        raise CheckpointError(
            f"find the checkpoint {path.name if named else path}",
            "it is not there",
            "`taskvm checkpoint list` shows all that have names" if named else "",
        )
    return path


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass  # another removes it too
    except OSError as error:
        raise CheckpointError(
            f"remove the checkpoint {path}", error.strerror or str(error), "Remove it by hand"
        ) from error
    for _ in forget_disks():
        pass  # sandboxes that run from it keep theirs


def _named(name: str) -> Path:
    if not _NAME.match(name):
        raise UsageError(
            f"use the checkpoint {name!r}",
            "a name has letters, digits and ._- and begins with one of the first two",
            "Write a path with a slash",
        )
    return store_dir() / name
