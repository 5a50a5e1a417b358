"""The layers of a running machine's disk: cut off, so that what it has written so far never changes again, and merged.

`cut` puts an empty layer on top while the machine is stopped (under 10 ms); what is beneath is then read-only and may
be copied. `merge` writes the top back into the layer under it while the machine runs, so that a sandbox that is saved
every minute does not get deeper and slower each time.

Both go on to their end when they are cancelled: what QEMU has done and we do not know of would be in the way for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from qemu.qmp import EventListener, ExecuteError

from taskvm.background import finished, outlast
from taskvm.errors import HostError, SandboxLostError, SandboxStateError
from taskvm.vm.command import Disk, layer_node, top_layer
from taskvm.vm.disk import create_layer
from taskvm.vm.machine import Machine

# Each layer is an open file of QEMU and a look into its tables for what is not cached; forks of forks add one each.
MAX_LAYERS = 32
MERGE_TIMEOUT_S = 600.0
_MERGING = "merge the layers of a disk"


class Layers:
    """The layers of `machine`, whose own are in the directory `directory`. `disk` is what it reads and writes now."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        self._machine = machine
        self._directory = directory
        self._paths = list(machine.files.disk.layers)
        self._nodes = [0]  # of the layers that were on top, the newest last
        self._next = 1
        self._prepared: int | None = None
        self._cuts = 0
        self._lent = 0

    @property
    def disk(self) -> Disk:
        """The layers from the top down, and the base."""
        return Disk(layers=tuple(self._paths), base=self._machine.files.disk.base)

    @property
    def written(self) -> Sequence[Path]:
        """Those that this machine has written: the top one, and what was cut off below it and is not merged."""
        return self._paths[: len(self._nodes)]

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
            while self._is_merge_possible():
                await self.merge()
        if len(self._paths) >= MAX_LAYERS:
            raise SandboxStateError(
                "save the disk of a sandbox",
                f"it has {MAX_LAYERS} layers, one for each fork in its line",
                "Close some of its forks, or make a checkpoint, and resume that: it has one",
            )
        number, self._next = (
            self._next,
            self._next + 1,
        )  # never used again, also when this is cancelled
        path = self._path(number)
        await asyncio.to_thread(create_layer, path, self.disk)
        for access in (os.O_RDWR, os.O_RDONLY):  # a layer that is written, and later only read
            descriptor = _open(path, access)
            try:
                await self._machine.give("add-fd", descriptor, **{"fdset-id": number})
            finally:
                os.close(descriptor)
        node = top_layer(number, f"/dev/fdset/{number}", locking=False)
        await self._machine.execute("blockdev-add", **node, backing=None)
        self._prepared = number

    async def cut(self) -> Disk:
        """Let the stopped machine write to the prepared layer from now on; return the disk beneath it."""
        return await finished(self._cut())

    async def merge(self) -> None:
        """Write the top layer back into the one under it, which nobody else may use, and remove it.

        Raises HostError when that does not succeed: the machine runs on, one layer deeper. SandboxLostError.
        """
        await finished(self._merge())

    @asynccontextmanager
    async def merged(self) -> AsyncIterator[None]:
        """Take away again at the end what is cut within, however that ends; on a full disk it stays."""
        cuts = self._cuts
        try:
            yield
        except BaseException:
            if self._cuts > cuts:
                with contextlib.suppress(HostError, SandboxLostError):  # the first error is told
                    await self.merge()
            raise
        if self._cuts > cuts:
            with contextlib.suppress(HostError):  # tried again when there are too many
                await self.merge()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Keep all layers within, for copies that have not linked them yet."""
        self._lent += 1
        try:
            yield
        finally:
            self._lent -= 1

    def _is_merge_possible(self) -> bool:
        """Whether the layer under the top is our own, and no copy has a name for it (launch.py) or is to have one."""
        return len(self._nodes) > 1 and not self._lent and self._paths[1].stat().st_nlink == 1

    async def _cut(self) -> Disk:
        beneath, top = self.disk, self._prepared
        assert top is not None, "a layer is prepared before it is needed"
        await self._machine.execute(
            "blockdev-snapshot", node=layer_node(self._nodes[-1]), overlay=layer_node(top)
        )
        self._nodes.append(top)
        self._paths.insert(0, self._path(top))
        self._prepared = None
        self._cuts += 1
        return beneath

    async def _merge(self) -> None:
        below, top = self._nodes[-2:]
        kinds = ("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
        with self._machine.listen(*kinds) as events:
            await self._machine.execute(
                "block-commit", **{"job-id": "merge", "device": layer_node(top)},
                **{"base-node": layer_node(below)},
            )  # fmt: skip
            # Never cancelled while it waits: an event that has just come would be lost with it.
            ending = asyncio.get_running_loop().create_task(self._wait_merged(events))
            try:
                await asyncio.wait([ending], timeout=MERGE_TIMEOUT_S)
                if not ending.done():  # it would be in the way of the next cut
                    await self._tell_job("block-job-cancel", force=True)
                error = await ending
            finally:
                ending.cancel()
                await outlast(ending)
        if error:
            raise HostError(_MERGING, error, "Free disk space; the sandbox runs on")
        self._nodes.pop()
        await self._discard(top)

    async def _wait_merged(self, events: EventListener) -> str:
        """Wait for the end of a merge; return why it failed, or nothing."""
        while True:
            event = await self._machine.next_event(events, _MERGING)
            if event["event"] == "BLOCK_JOB_READY":
                await self._tell_job("block-job-complete")
                continue
            data = event.get("data")
            if event["event"] == "BLOCK_JOB_CANCELLED":
                return f"it was not done within {MERGE_TIMEOUT_S:.0f} s"
            return str(data["error"]) if isinstance(data, dict) and "error" in data else ""

    async def _tell_job(self, command: str, **arguments: bool) -> None:
        """Ask for a change of the merge. QEMU refuses when it has ended, or is about to: its events tell how."""
        try:
            await self._machine.execute(command, device="merge", **arguments)
        except SandboxLostError as error:
            if not isinstance(error.__cause__, ExecuteError):
                raise

    def _path(self, number: int) -> Path:
        return self._directory / f"layer{number}.qcow2"

    async def _discard(self, number: int) -> None:
        await self._machine.execute("blockdev-del", **{"node-name": layer_node(number)})
        await self._machine.execute("remove-fd", **{"fdset-id": number})
        self._paths.pop(0).unlink()


def _open(path: Path, access: int) -> int:
    try:
        return os.open(path, access | os.O_CLOEXEC)
    except OSError as error:
        # The sandbox was closed while a thread wrote it: its directory is gone.
        raise HostError(f"open the disk {path}", error.strerror or str(error)) from error
