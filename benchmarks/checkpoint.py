"""What checkpoints and forks cost, as JSON: `python benchmarks/checkpoint.py [REPEATS [FORKS]]`.

Times are wall-clock milliseconds on the machine as it is: run it on a quiet one. `frozen_ms` is how long programs stood
still, `stopped_ms` the virtual processors; `answered` is to the end of a first exec.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from taskvm import Checkpoint, Sandbox
from taskvm.guest import Guest
from taskvm.usage import Statistics

SHAPE = {"cpus": 1, "memory_mib": 512}


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 1),
        "p95": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))], 1),
    }


class Frozen:
    """Measures how long the programs of guests stand still."""

    def __init__(self) -> None:
        self.spans_ms: list[float] = []
        real = Guest.at_rest

        @asynccontextmanager
        async def at_rest(guest: Guest) -> AsyncIterator[None]:
            began = time.perf_counter()
            async with real(guest):
                yield
            self.spans_ms.append((time.perf_counter() - began) * 1000)

        Guest.at_rest = at_rest  # type: ignore[method-assign]


async def save(vm: Sandbox, directory: Path, repeats: int, *, memory: bool) -> dict[str, object]:
    """Save `vm` several times; return what it took, and leave the last one as `last` in the directory."""
    frozen, whole = Frozen(), []
    for number in range(repeats):
        await vm.exec("head -c 32M /dev/urandom > /root/fresh; sync", check=True)
        began = time.perf_counter()
        checkpoint = await vm.checkpoint(directory / f"{memory}-{number}", memory=memory)
        whole.append((time.perf_counter() - began) * 1000)
        if number + 1 < repeats:
            checkpoint.delete()
        else:
            checkpoint.path.rename(directory / f"last-{memory}")
    return {"whole_ms": spread(whole), "frozen_ms": spread(frozen.spans_ms)}


async def resume(path: Path, repeats: int) -> dict[str, float]:
    spans = []
    for _ in range(repeats):
        began = time.perf_counter()
        async with Checkpoint.load(path).resume() as vm:
            await vm.exec(["true"], check=True)
            spans.append((time.perf_counter() - began) * 1000)
    return spread(spans)


async def fork(vm: Sandbox, count: int) -> dict[str, float]:
    began = time.perf_counter()
    children = [each for each in await vm.fork_many(count) if isinstance(each, Sandbox)]
    await asyncio.gather(*(each.exec(["true"], check=True) for each in children))
    took = time.perf_counter() - began
    used: list[Statistics] = [each.statistics() for each in children]
    result = {
        "asked": count,
        "answered": len(children),
        "all_answered_s": round(took, 2),
        "memory_mib": sum(each.proportional_bytes for each in used) >> 20,
    }
    await asyncio.gather(*(each.close() for each in children))
    return result


async def main(repeats: int, forks: int) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TASKVM_CACHE")) as name:
        directory = Path(name)
        async with Sandbox.create(**SHAPE) as vm:
            disk = await save(vm, directory, repeats, memory=False)
            await vm.spawn("while :; do sleep 0.01; done")
            memory = await save(vm, directory, repeats, memory=True)
            forked = await fork(vm, forks)
        began = time.perf_counter()
        await resume(directory / "last-False", 1)
        first_s = time.perf_counter() - began
        figures = {
            "disk_checkpoint_32_mb": disk,
            "memory_checkpoint_512_mib": memory,
            "first_resume_of_a_disk_s": round(first_s, 1),
            "resume_disk_answered_ms": await resume(directory / "last-False", repeats),
            "resume_memory_answered_ms": await resume(directory / "last-True", repeats),
            "forks": forked,
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    words = [int(word) for word in sys.argv[1:]]
    asyncio.run(main(*words, *(5, 50)[len(words) :]))
