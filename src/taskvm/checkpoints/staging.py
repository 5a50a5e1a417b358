"""A checkpoint while it is made: a private directory beside it, which becomes it in one step, or is gone.

Who makes it holds the directory (`taskvm.paths.hold`), so that what a killed process left can be told and removed.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from taskvm.checkpoints.checkpointfile import (
    MEMORY_FILES,
    Facts,
    Saved,
    note_verified,
    read_checkpoint,
    read_facts,
)
from taskvm.errors import CheckpointError
from taskvm.paths import hold_new, private_dir, seized, state_dir, sync_directory
from taskvm.vm.template import mark_file

_FILES = frozenset({"disk.qcow2", "memory.json", *MEMORY_FILES})


def store_dir() -> Path:
    """Return the directory of the checkpoints that have names."""
    return private_dir(state_dir() / "checkpoints")


def stored_disks() -> dict[str, Facts]:
    """Return the checkpoints of the store by name, damaged ones left out: what their disks say of themselves."""
    found = {}
    for path in sorted(store_dir().iterdir()):
        with suppress(CheckpointError):
            if not path.name.startswith("."):
                found[path.name] = read_facts(path / "disk.qcow2" if path.is_dir() else path)
    return found


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A directory for the parts of the checkpoint `path`; `publish` makes it that. Raises CheckpointError.

    An OSError within is one as well: the disk is full.
    """
    operation = f"make the checkpoint {path}"
    if path.exists() or path.is_symlink():
        raise CheckpointError(operation, "it is there already", "Remove it, or name another")
    sweep_staged(path.parent, None if path.parent == store_dir() else path.name)

    def make() -> Path:
        staging = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        staging.mkdir(mode=0o700)
        return staging

    try:
        staging, held = hold_new(make)
    except OSError as error:
        raise CheckpointError(
            operation,
            error.strerror or str(error),
            "Choose a directory that is there and may be written",
        ) from error
    try:
        yield staging
    except OSError as error:
        if error.errno is None:  # no file's: a timeout
            raise
        raise CheckpointError(
            operation,
            error.strerror or str(error),
            "Free disk space, or choose a larger disk",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(held)


def publish(staging: Path, path: Path, *, memory: bool) -> None:
    """Let what is in `staging` be the checkpoint `path`, which is not there. Raises CheckpointError."""
    try:
        if memory:
            staging.rename(path)  # fails unless what is there is an empty directory
        else:
            path.hardlink_to(staging / "disk.qcow2")  # fails when something is there
        sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"make the checkpoint {path}", error.strerror or str(error), "Choose another name"
        ) from error


def read_published(path: Path) -> Saved:
    """Return the checkpoint that was made a moment ago. Call it when `staged` is over: that touches its file."""
    saved = read_checkpoint(path)
    note_verified(saved, mark_file(saved.disk))
    return saved


def sweep_staged(directory: Path, name: str | None = None) -> None:
    """Remove what killed processes left of the checkpoint `name`, or of all, in `directory`."""
    pattern = f".{'*' if name is None else glob.escape(name)}.{'[0-9a-f]' * 8}"
    for path in directory.glob(pattern):
        with suppress(OSError):
            if path.is_symlink() or not path.is_dir() or not _is_ours(path):
                continue
            with seized(path) as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    """Whether nothing else is in a directory than what a checkpoint is made of."""
    return all(
        each.name in _FILES or each.name.startswith(".memory.json.") for each in path.iterdir()
    )
