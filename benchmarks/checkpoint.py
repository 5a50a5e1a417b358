"""What checkpoints and forks cost, as JSON: `python benchmarks/checkpoint.py [REPEATS [FORKS]]`.

Times are wall-clock milliseconds on the machine as it is: run it on a quiet one. `frozen_ms` is how long programs stood
still, `stopped_ms` how long the virtual processors did; `answered` is to the end of a first exec. `forks` are of a
sandbox that rests, `starts` as many of a template, in the same run: what a fork costs beyond a start is the difference.
CPU is of this process and of all QEMUs, which a loaded machine spoils less than times.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from taskvm import Sandbox
from taskvm.checkpoints import saving
from taskvm.guest import Guest
from taskvm.opening import Opening
from taskvm.vm.snapshot import Cut

SHAPE = {"cpus": 1, "memory_mib": 512}


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 1),
        "p95": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))], 1),
    }


class Frozen:
    """Measures how long the programs of guests stand still, and their processors."""

    def __init__(self) -> None:
        self.spans_ms: list[float] = []
        self.stopped_ms: list[float] = []
        real, save_disk, save_machine = Guest.at_rest, saving.save_disk, saving.save_machine

        @asynccontextmanager
        async def at_rest(guest: Guest) -> AsyncIterator[None]:
            began = time.perf_counter()
            async with real(guest):
                yield
            self.spans_ms.append((time.perf_counter() - began) * 1000)

        async def disk(*operands: Any) -> Cut:
            cut = await save_disk(*operands)
            self.stopped_ms.append(cut.stopped_s * 1000)
            return cut

        async def machine(*operands: Any) -> Cut:
            cut = await save_machine(*operands)
            self.stopped_ms.append(cut.stopped_s * 1000)
            return cut

        Guest.at_rest = at_rest  # type: ignore[method-assign]
        saving.save_disk, saving.save_machine = disk, machine


async def save(vm: Sandbox, directory: Path, repeats: int, *, memory: bool) -> dict[str, object]:
    """Save `vm` several times; return what it took, and leave the last one as `last` in the directory."""
    frozen, whole = Frozen(), []
    for number in range(repeats):
        await vm.exec("head -c 32M /dev/urandom > /root/fresh; sync", check=True)
        began = time.perf_counter()
        checkpoint = await vm.checkpoint(directory / f"{memory}-{number}", memory=memory)
        whole.append((time.perf_counter() - began) * 1000)
        checkpoint.delete()
    return {
        "whole_ms": spread(whole),
        "frozen_ms": spread(frozen.spans_ms),
        "stopped_ms": spread(frozen.stopped_ms),
    }


async def answer(begin: Callable[[], Opening[Sandbox]], repeats: int) -> dict[str, float]:
    """Time from asking for a sandbox to the answer of its first command, closing not counted."""
    spans = []
    for _ in range(repeats):
        began = time.perf_counter()
        async with begin() as vm:
            await vm.exec(["true"], check=True)
            spans.append((time.perf_counter() - began) * 1000)
    return spread(spans)


def processor_s(vms: Sequence[Sandbox]) -> float:
    """Processor time of all their QEMUs."""
    return sum(vm.statistics().cpu_s for vm in vms)


async def many(begin: Awaitable[Sequence[object]], count: int) -> dict[str, float]:
    """Wait until all that `begin` starts have answered."""
    began, cpu_s = time.perf_counter(), time.process_time()
    vms = [each for each in await begin if isinstance(each, Sandbox)]
    started_s = time.perf_counter() - began
    await asyncio.gather(*(each.exec(["true"], check=True) for each in vms))
    took_s = time.perf_counter() - began
    result = {
        "asked": count,
        "answered": len(vms),
        "all_started_s": round(started_s, 2),
        "all_answered_s": round(took_s, 2),
        "cpu_ours_s": round(time.process_time() - cpu_s, 2),
        "cpu_qemu_s": round(processor_s(vms), 2),
        "memory_mib": sum(each.statistics().proportional_bytes for each in vms) >> 20,
    }
    await asyncio.gather(*(each.close() for each in vms))
    return result


async def start_many(count: int) -> list[Sandbox]:
    return await asyncio.gather(*(Sandbox.create(**SHAPE) for _ in range(count)))


async def main(repeats: int, forks: int) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TASKVM_CACHE")) as name:
        directory = Path(name)
        async with Sandbox.create(**SHAPE) as vm:
            disk = await save(vm, directory, repeats, memory=False)
            program = await vm.spawn("while :; do sleep 0.01; done")
            memory = await save(vm, directory, repeats, memory=True)
            # Each copy would run it: 50 that begin 100 programs a second are another figure.
            await program.kill_all()
            saved_disk = await vm.checkpoint(directory / "disk")
            saved_memory = await vm.checkpoint(directory / "memory", memory=True)
            forked = await many(vm.fork_many(forks), forks)
            started = await many(start_many(forks), forks)
        first = await answer(saved_disk.resume, 1)
        figures = {
            "disk_checkpoint_32_mb": disk,
            "memory_checkpoint_512_mib": memory,
            "first_resume_of_a_disk_ms": first["p50"],
            "start_answered_ms": await answer(lambda: Sandbox.create(**SHAPE), repeats),
            "resume_disk_answered_ms": await answer(saved_disk.resume, repeats),
            "resume_memory_answered_ms": await answer(saved_memory.resume, repeats),
            "forks": forked,
            "starts": started,
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    words = [int(word) for word in sys.argv[1:]]
    asyncio.run(main(*words, *(5, 50)[len(words) :]))
