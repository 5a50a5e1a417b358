"""Time to the first command of a new sandbox, and of a command on a running one. Prints one JSON object.

    python benchmarks/start.py [--runs 50] [--cold-runs 5] [--execs 200]

Warm: from calling `Sandbox.create` to the answer of its first `exec(["true"])`, in a process that has imported the SDK
and has started one sandbox before (the template exists). `ahead` is the same with a WarmPool, whose guests were
started ahead.
Cold: with `warm=False`, a boot. Compare figures of one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable

from taskvm import Sandbox, WarmPool

CPUS, MEMORY_MIB = 2, 512


def summary(values: list[float]) -> dict[str, float]:
    """Median, 95th percentile, least and most, in milliseconds."""
    ordered = sorted(values)
    return {
        "p50_ms": round(statistics.median(ordered), 1),
        "p95_ms": round(ordered[max(0, round(len(ordered) * 0.95) - 1)], 1),
        "min_ms": round(ordered[0], 1),
        "max_ms": round(ordered[-1], 1),
        "runs": len(ordered),
    }


async def measure(work: Callable[[], Awaitable[object]], runs: int) -> dict[str, float]:
    """Time `work`, one after the other."""
    values = []
    for _ in range(runs):
        begun = time.perf_counter()
        await work()
        values.append((time.perf_counter() - begun) * 1000)
    return summary(values)


async def first_commands(
    runs: int, *, warm: bool, pool: WarmPool | None = None
) -> dict[str, float]:
    """Time create to first answer; closing is not part of it."""
    values = []
    for _ in range(runs):
        if pool is not None:
            await pool.wait_full()
        begun = time.perf_counter()
        vm = await Sandbox.create(cpus=CPUS, memory_mib=MEMORY_MIB, warm=warm, pool=pool)
        await vm.exec(["true"], check=True)
        values.append((time.perf_counter() - begun) * 1000)
        await vm.close()
    return summary(values)


async def main(runs: int, cold_runs: int, execs: int) -> dict[str, dict[str, float]]:
    figures = {}
    async with Sandbox.create(cpus=CPUS, memory_mib=MEMORY_MIB) as vm:
        await vm.exec(["true"])
        await vm.exec("true")
        figures["exec_list"] = await measure(lambda: vm.exec(["true"]), execs)
        figures["exec_shell"] = await measure(lambda: vm.exec("true"), execs)
        figures["stat"] = await measure(lambda: vm.files.stat("/etc/passwd"), execs)
    figures["warm_first_command"] = await first_commands(runs, warm=True)
    async with WarmPool(size=2, cpus=CPUS, memory_mib=MEMORY_MIB) as pool:
        figures["warm_first_command_ahead"] = await first_commands(runs, warm=True, pool=pool)
    figures["cold_first_command"] = await first_commands(cold_runs, warm=False)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--cold-runs", type=int, default=5)
    parser.add_argument("--execs", type=int, default=200)
    chosen = parser.parse_args()
    print(json.dumps(asyncio.run(main(chosen.runs, chosen.cold_runs, chosen.execs)), indent=2))
