"""Disks as files: empty layers, and the one file that says what several layers say.

Every format is named, none is ever guessed from a file's content. A layer's bytes come from a guest, and from a QEMU
that a guest may have taken over: its head is read by `taskvm.wire.qcow2` before a tool opens it, and the tool is
confined to the files it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path

from taskvm.errors import HostError
from taskvm.vm.command import Disk, confine_command, disk_beneath
from taskvm.vm.native import confine_binary
from taskvm.vm.qemu import Qemu
from taskvm.wire.qcow2 import (
    MAX_DISK_BYTES,
    MAX_HEAD_BYTES,
    Qcow2Error,
    Qcow2Header,
    encode_empty,
    encode_header,
    parse_header,
)


def create_layer(path: Path, beneath: Disk) -> None:
    """Make the file `path`: an empty layer above `beneath`, as large as it. Raises HostError when the disk is full."""
    try:
        path.write_bytes(encode_empty(disk_size(beneath)))
    except OSError as error:
        raise HostError(
            f"create the disk {path}",
            error.strerror or str(error),
            "Free disk space, or check the permissions of the cache directory",
        ) from error


def disk_size(disk: Disk) -> int:
    """Return how many bytes a guest sees of a disk. Raises HostError for a file that is not a disk."""
    if disk.layers:
        return read_header(disk.layers[0]).size_bytes
    return disk.base.stat().st_size if disk.base is not None else disk.size_bytes


def read_header(path: Path) -> Qcow2Header:
    """Return the checked header of a layer. Raises HostError for what no tool may open."""
    try:
        with path.open("rb") as file:
            return parse_header(file.read(MAX_HEAD_BYTES), os.fstat(file.fileno()).st_size)
    except (OSError, Qcow2Error) as error:
        raise HostError(f"read the disk {path}", str(error)) from error


async def flatten(qemu: Qemu, disk: Disk, path: Path) -> None:
    """Write what all layers of `disk` say to the new file `path`: one layer above the same base, which names nothing.

    Raises HostError with qemu-img's words.
    """
    assert disk.base is not None, "a disk of nothing has no layers"
    for layer in disk.layers:
        read_header(layer)
    source = {**disk_beneath(disk.layers, disk.base), "force-share": True}
    _make(path)
    program = [
        str(qemu.image_tool), "convert", "-q", "-U", "-m", "4", "-W", "-O", "qcow2",
        "-B", str(disk.base), "-F", "raw", f"json:{json.dumps(source)}", str(path),
    ]  # fmt: skip
    await _run_confined(program, read=[*disk.layers, disk.base], write=path)
    _drop_names(path)


def _make(path: Path) -> None:
    path.touch(mode=0o600, exist_ok=False)  # Landlock knows only files that are there


def _drop_names(path: Path) -> None:
    header = encode_header(read_header(path))
    with path.open("r+b") as file:
        file.write(
            header.ljust(4096, b"\0")
        )  # qemu-img writes the name of the base into this block


async def _run_confined(program: list[str], *, read: list[Path], write: Path) -> None:
    lifeline, ours = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ours)
        with contextlib.closing(os.fdopen(lifeline)):
            command = confine_command(
                confine_binary(),
                program,
                read=read,
                write=[write],
                copy_on_write=None,
                file_size_bytes=MAX_DISK_BYTES,
                lifeline=lifeline,
                accelerator="tcg",
            )
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=[lifeline],
                env={"LC_ALL": "C"},
                cwd="/",
            )
        _, stderr = await process.communicate()
    if process.returncode != 0:
        raise HostError(
            f"write the disk {write}",
            stderr.decode("utf-8", "replace").strip()[:2000]
            or f"qemu-img ended with {process.returncode}",
            "Free disk space, or check the permissions of its directory",
        )
