"""What idle sandboxes cost, and how many start at once. Prints one JSON object.

    python benchmarks/idle.py [--idle 20] [--seconds 30] [--at-once 20 50]

Idle: sandboxes with 512 MiB and the default options, after one command each. Memory is QEMU's proportional set size
(each shared page divided among those that share it); CPU is QEMU's time divided by the time that passed, awake (no
pause) and paused (idle_pause_s=1). At once: `asyncio.gather` of so many starts and first commands; every one must
answer. Compare figures of one quiet machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from contextlib import AsyncExitStack

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


async def main(count: int, seconds: float, counts: list[int]) -> dict[str, object]:
    async with Sandbox.create(cpus=CPUS, memory_mib=MEMORY_MIB) as vm:  # the template exists now
        await vm.exec(["true"], check=True)
    return {
        "idle_awake": await idle(count, seconds, 0),
        "idle_paused": await idle(count, seconds, 1),
        "at_once": [await at_once(number) for number in counts],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--at-once", type=int, nargs="*", default=[20, 50])
    chosen = parser.parse_args()
    print(json.dumps(asyncio.run(main(chosen.idle, chosen.seconds, chosen.at_once)), indent=2))
