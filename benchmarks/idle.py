"""What idle sandboxes cost, and how many start at once. Prints one JSON object.

    python benchmarks/idle.py [--idle 20] [--seconds 30] [--at-once 20 50] [--many 0]

Idle: sandboxes with 512 MiB and the default options, after one command each. Memory is QEMU's proportional set size
(each shared page divided among those that share it); CPU is QEMU's time divided by the time that passed, awake (no
pause) and paused (idle_pause_s=1). At once: `asyncio.gather` of so many starts and first commands; every one must
answer. Many (200, say; 40 MiB each): started four at a time, left until they are paused, and then each must answer.
Compare figures of one quiet machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path

from taskvm import Sandbox

CPUS, MEMORY_MIB = 2, 512
MIB = 1024 * 1024


async def started(stack: AsyncExitStack, idle_pause_s: float) -> Sandbox:
    """A sandbox that has answered a command."""
    create = Sandbox.create(cpus=CPUS, memory_mib=MEMORY_MIB, idle_pause_s=idle_pause_s)
    vm = await stack.enter_async_context(create)
    await vm.exec(["true"], check=True)
    return vm


async def idle(count: int, seconds: float, idle_pause_s: float) -> dict[str, float]:
    """Memory and CPU of `count` sandboxes that nobody uses for `seconds`."""
    async with AsyncExitStack() as stack:
        vms = [await started(stack, idle_pause_s) for _ in range(count)]
        await asyncio.sleep(3)  # what a start leaves to be done, and the pause
        begun, before = time.perf_counter(), [vm.statistics() for vm in vms]
        host_before = time.process_time()
        await asyncio.sleep(seconds)
        host_s = time.process_time() - host_before
        after, passed_s = [vm.statistics() for vm in vms], time.perf_counter() - begun
        used_s = sum(b.cpu_s - a.cpu_s for a, b in zip(before, after, strict=True))
        waking = time.perf_counter()
        await vms[0].exec(["true"], check=True)
        return {
            "sandboxes": count,
            "pss_mib_each": round(statistics.mean(s.proportional_bytes for s in after) / MIB, 1),
            "rss_mib_each": round(statistics.mean(s.resident_bytes for s in after) / MIB, 1),
            "paused": sum(s.paused for s in after),
            "qemu_cpu_percent_all": round(100 * used_s / passed_s, 2),
            "host_process_cpu_percent": round(100 * host_s / passed_s, 2),
            "next_command_ms": round(1000 * (time.perf_counter() - waking), 1),
        }


async def at_once(count: int) -> dict[str, float]:
    """Seconds until `count` sandboxes that are started together have all answered."""
    async with AsyncExitStack() as stack:
        begun = time.perf_counter()
        vms = await asyncio.gather(*(started(stack, 0) for _ in range(count)))
        return {"sandboxes": len(vms), "all_answered_s": round(time.perf_counter() - begun, 2)}


async def many(count: int) -> dict[str, float]:
    """What `count` paused sandboxes cost, and seconds until each has answered again: alone at most, and all at once."""
    gate = asyncio.Semaphore(4)
    async with AsyncExitStack() as stack:

        async def start() -> Sandbox:
            async with gate:
                return await started(stack, 5)

        begun = time.perf_counter()
        vms = await asyncio.gather(*(start() for _ in range(count)))
        started_s = time.perf_counter() - begun
        await asyncio.sleep(15)
        usage = [vm.statistics() for vm in vms]
        alone_s = [await answer_s(vm) for vm in vms[::10]]
        begun = time.perf_counter()
        await asyncio.gather(*(answer_s(vm) for vm in vms))
        return {
            "sandboxes": len(vms),
            "started_s": round(started_s, 1),
            "paused": sum(each.paused for each in usage),
            "pss_mib_each": round(statistics.mean(s.proportional_bytes for s in usage) / MIB, 1),
            "descriptors": entries("/proc/self/fd"),
            "threads": entries("/proc/self/task"),
            "answer_alone_at_most_s": round(max(alone_s), 2),
            "all_answered_at_once_s": round(time.perf_counter() - begun, 1),
        }


def entries(directory: str) -> int:
    return len(list(Path(directory).iterdir()))


async def answer_s(vm: Sandbox) -> float:
    """Seconds until `vm` has answered a command."""
    begun = time.perf_counter()
    await vm.exec(["true"], check=True)
    return time.perf_counter() - begun


async def main(count: int, seconds: float, counts: list[int], many_count: int) -> dict[str, object]:
    async with Sandbox.create(cpus=CPUS, memory_mib=MEMORY_MIB) as vm:  # the template exists now
        await vm.exec(["true"], check=True)
    return {
        "idle_awake": await idle(count, seconds, 0),
        "idle_paused": await idle(count, seconds, 1),
        "at_once": [await at_once(number) for number in counts],
        **({"many": await many(many_count)} if many_count else {}),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--at-once", type=int, nargs="*", default=[20, 50])
    parser.add_argument("--many", type=int, default=0)
    chosen = parser.parse_args()
    figures = main(chosen.idle, chosen.seconds, chosen.at_once, chosen.many)
    print(json.dumps(asyncio.run(figures), indent=2))
