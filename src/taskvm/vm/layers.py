"""The layers of a running machine's disk: cut off, so that what it has written so far never changes again, and merged.

`cut` puts an empty layer on top while the machine is stopped (under 10 ms); what is beneath is then read-only and may
be copied. `merge` writes the top back into the layer under it while the machine runs, so that a sandbox that is saved
every minute does not get deeper and slower each time.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from taskvm.errors import SandboxLostError, SandboxStateError
from taskvm.vm.command import Disk, layer_node, top_layer
from taskvm.vm.disk import create_layer
from taskvm.vm.machine import Machine

# Each layer is an open file of QEMU and a look into its tables for what is not cached; forks of forks add one each.
MAX_LAYERS = 32
MERGE_TIMEOUT_S = 600.0


class Layers:
    """The layers of `machine`, whose own are in the directory `directory`. `disk` is what it reads and writes now."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        self._machine = machine
        self._directory = directory
        self._paths = list(machine.files.disk.layers)
        self._nodes = [0]  # of the layers that were on top, the newest last
        self._next = 1
        self._prepared: int | None = None

    @property
    def disk(self) -> Disk:
        """The layers from the top down, and the base."""
        return Disk(layers=tuple(self._paths), base=self._machine.files.disk.base)

    async def resize(self, size_bytes: int) -> None:
        """Make the disk `size_bytes` large; the guest's driver is told. The layers beneath stay as they are."""
        node = layer_node(self._nodes[-1])
        await self._machine.execute("block_resize", **{"node-name": node, "size": size_bytes})
        self._prepared = None  # it has the size of before

    async def prepare(self) -> None:
        """Give QEMU the empty layer of the next `cut`. Raises SandboxStateError when there are too many."""
        if self._prepared is not None:  # for a cut that was given up
            return
        if len(self._paths) >= MAX_LAYERS:
            raise SandboxStateError(
                "save the disk of a sandbox",
                f"it has {MAX_LAYERS} layers, one for each fork in its line",
                "Make a checkpoint, and resume that: it has one",
            )
        number, self._next = (
            self._next,
            self._next + 1,
        )  # never used again, also when this is cancelled
        path = self._path(number)
        await asyncio.to_thread(create_layer, path, self.disk)
        for access in (os.O_RDWR, os.O_RDONLY):  # a layer that is written, and later only read
            descriptor = os.open(path, access | os.O_CLOEXEC)
            try:
                await self._machine.give("add-fd", descriptor, **{"fdset-id": number})
            finally:
                os.close(descriptor)
        node = top_layer(number, f"/dev/fdset/{number}", locking=False)
        await self._machine.execute("blockdev-add", **node, backing=None)
        self._prepared = number

    async def cut(self) -> Disk:
        """Let the stopped machine write to the prepared layer from now on; return the disk beneath it."""
        beneath, top = self.disk, self._prepared
        assert top is not None, "a layer is prepared before it is needed"
        await self._machine.execute(
            "blockdev-snapshot", node=layer_node(self._nodes[-1]), overlay=layer_node(top)
        )
        self._nodes.append(top)
        self._paths.insert(0, self._path(top))
        self._prepared = None
        return beneath

    async def merge(self) -> None:
        """Write the top layer back into the one under it, which nobody else may use, and remove it."""
        below, top = self._nodes[-2:]
        with self._machine.listen("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED") as events:
            await self._machine.execute(
                "block-commit", **{"job-id": "merge", "device": layer_node(top)},
                **{"base-node": layer_node(below)},
            )  # fmt: skip
            async with asyncio.timeout(MERGE_TIMEOUT_S):
                while (event := await events.get())["event"] == "BLOCK_JOB_READY":
                    await self._machine.execute("block-job-complete", device="merge")
        data = event.get("data")
        if isinstance(data, dict) and "error" in data:
            raise SandboxLostError("merge the layers of a disk", str(data["error"]))
        self._nodes.pop()
        await self._discard(top)

    def _path(self, number: int) -> Path:
        return self._directory / f"layer{number}.qcow2"

    async def _discard(self, number: int) -> None:
        await self._machine.execute("blockdev-del", **{"node-name": layer_node(number)})
        await self._machine.execute("remove-fd", **{"fdset-id": number})
        self._paths.pop(0).unlink()
