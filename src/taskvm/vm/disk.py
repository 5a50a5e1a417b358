"""Disks: qcow2 overlays on read-only files. Every format is named, none is ever guessed from a file's content."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Literal

from taskvm.errors import HostError
from taskvm.vm.qemu import Qemu

Format = Literal["raw", "qcow2"]


async def create_overlay(
    qemu: Qemu, path: Path, backing: Path, backing_format: Format, *, size_bytes: int | None = None
) -> None:
    """Make the empty overlay `path` above `backing`.

    With `size_bytes` the backing file is not opened, and may not be there yet. Raises HostError with qemu-img's words.
    """
    command = [str(qemu.image_tool), "create", "-q", "-f", "qcow2"]
    if size_bytes is not None:
        command.append("-u")
    command += ["-b", str(backing), "-F", backing_format, str(path)]
    if size_bytes is not None:
        command.append(str(size_bytes))
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await process.communicate()
    if process.returncode != 0:
        raise HostError(
            f"create the disk {path}",
            stderr.decode("utf-8", "replace").strip()
            or f"qemu-img exited with {process.returncode}",
            "Free disk space, or check the permissions of the cache directory",
        )


def copy_overlay(model: Path, path: Path) -> None:
    """Make the overlay `path` as a copy of the empty overlay `model` (192 KiB; saves a process start).

    Raises HostError when the disk is full.
    """
    try:
        shutil.copyfile(model, path)
    except OSError as error:
        raise HostError(
            f"create the disk {path}", error.strerror or str(error), "Free disk space"
        ) from error
