"""Saved sandboxes, for programs that block."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack

from taskvm.checkpoints import checkpoint as aio
from taskvm.options import ResumeArguments

if TYPE_CHECKING:
    from taskvm.sync.sandbox import Sandbox


class Checkpoint:
    """A saved sandbox. Any number of new ones can start from it, at the same time too.

    `path` is where it is, `name` its name there. `memory` says whether running programs are in it, or its disk alone.
    `image` is the digest of the image that its disk lies above, `sha256` that of the disk; `qemu_version` saved it.
    """

    def __init__(self, checkpoint: aio.Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.path: Path = checkpoint.path
        self.name: str = checkpoint.name
        self.memory: bool = checkpoint.memory
        self.image: str = checkpoint.image
        self.sha256: str = checkpoint.sha256
        self.qemu_version: str = checkpoint.qemu_version
        self.arch: str = checkpoint.arch
        self.cpus: int = checkpoint.cpus
        self.memory_mib: int = checkpoint.memory_mib
        self.created: str = checkpoint.created

    @classmethod
    def load(cls, target: str | os.PathLike[str]) -> Self:
        """Return the checkpoint `target`: a name in the store, or a path (an os.PathLike, or a str with a slash).

        Raises CheckpointError when it is not there, damaged, or not to be trusted.
        """
        return cls(aio.Checkpoint.load(target))

    @property
    def disk_bytes(self) -> int:
        """What it takes of the host's disk."""
        return self._checkpoint.disk_bytes

    def resume(self, **options: Unpack[ResumeArguments]) -> Sandbox:
        """Start a sandbox from it and return it running. See `taskvm.Checkpoint.resume`."""
        from taskvm.sync.sandbox import Sandbox  # it imports us

        return Sandbox.create(checkpoint=self, **options)

    def delete(self) -> None:
        """Remove it. Sandboxes that started from it run on. Idempotent."""
        self._checkpoint.delete()
