"""Time to the first command of a new sandbox, and of a command on a running one. Prints one JSON object.

    python benchmarks/start.py [--runs 50] [--cold-runs 5] [--execs 200] [--at-once 20] [--cpus 2]

Warm: from calling `Sandbox.create` to the answer of its first `exec(["true"])`, in a process that has imported the SDK
and has started one sandbox before (the template exists). `ahead` is the same with a WarmPool, whose guests were
started ahead.
Cold: with `warm=False`, a boot. Compare figures of one run only.

`cpu_of_a_start` is processor time, which a busy machine changes less than the clock's: of each sandbox, from create to
close, this process, and QEMU with its supervisor (user and sys). `cpu_of_many_at_once` is the same for so many starts
at once.

The account of one start without KVM, two CPUs, in ms of processor time (Xeon, QEMU 7.2, 2 cores that others used too):

    this process                           20   of it 5 for spawning, 4 for equipping, 2 for closing
    QEMU: its own start                    36   17 of them to be loaded (--version), 34 for an empty q35
    QEMU: loads the devices' state          7
    the guest wakes, takes its identity   100   10 500 blocks of code translated
    the guest's first exec            140-200   13 000 blocks; a second one takes 25-35
    QEMU: its end, the supervisor          10

A block is translated once, in 7-10 us, and cannot be had from another QEMU. With `--cpus 1` the same blocks cost 130 ms
less: with two, one virtual CPU spins on a lock while the host runs another thread than that which holds it, and each
PAUSE leaves QEMU's inner loop. A WarmPool pays ahead for all of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import time
from collections.abc import Awaitable, Callable

from taskvm import Sandbox, WarmPool

MEMORY_MIB = 512
PROCESSES = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


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
    runs: int, cpus: int, *, warm: bool, pool: WarmPool | None = None
) -> dict[str, float]:
    """Time create to first answer; closing is not part of it."""
    values = []
    for _ in range(runs):
        if pool is not None:
            await pool.wait_full()
        begun = time.perf_counter()
        vm = await Sandbox.create(cpus=cpus, memory_mib=MEMORY_MIB, warm=warm, pool=pool)
        await vm.exec(["true"], check=True)
        values.append((time.perf_counter() - begun) * 1000)
        await vm.close()
    return summary(values)


async def cpu_of_starts(count: int, cpus: int, *, at_once: bool) -> dict[str, float]:
    """Milliseconds of processor time for each of `count` sandboxes that answer one command and are closed."""

    async def start() -> Sandbox:
        vm = await Sandbox.create(cpus=cpus, memory_mib=MEMORY_MIB)
        await vm.exec(["true"], check=True)
        return vm

    here, below = map(resource.getrusage, PROCESSES)
    begun = time.perf_counter()
    if at_once:
        vms = await asyncio.gather(*(start() for _ in range(count)))
        answered_s = time.perf_counter() - begun
        await asyncio.gather(*(vm.close() for vm in vms))
    else:
        for _ in range(count):
            await (await start()).close()
        answered_s = time.perf_counter() - begun
    here_then, below_then = map(resource.getrusage, PROCESSES)
    spent_s = {
        "host_python": here_then.ru_utime + here_then.ru_stime - here.ru_utime - here.ru_stime,
        "qemu_user": below_then.ru_utime - below.ru_utime,
        "qemu_sys": below_then.ru_stime - below.ru_stime,
    }
    each_ms = {f"{name}_ms": round(1000 * spent / count, 1) for name, spent in spent_s.items()}
    return {"sandboxes": count, "all_answered_s": round(answered_s, 2), **each_ms}


async def main(
    runs: int, cold_runs: int, execs: int, many: int, cpus: int
) -> dict[str, dict[str, float]]:
    figures = {}
    async with Sandbox.create(cpus=cpus, memory_mib=MEMORY_MIB) as vm:
        await vm.exec(["true"])
        await vm.exec("true")
        figures["exec_list"] = await measure(lambda: vm.exec(["true"]), execs)
        figures["exec_shell"] = await measure(lambda: vm.exec("true"), execs)
        figures["stat"] = await measure(lambda: vm.files.stat("/etc/passwd"), execs)
    figures["warm_first_command"] = await first_commands(runs, cpus, warm=True)
    figures["cpu_of_a_start"] = await cpu_of_starts(runs, cpus, at_once=False)
    figures["cpu_of_many_at_once"] = await cpu_of_starts(many, cpus, at_once=True)
    async with WarmPool(size=2, cpus=cpus, memory_mib=MEMORY_MIB) as pool:
        figures["warm_first_command_ahead"] = await first_commands(runs, cpus, warm=True, pool=pool)
    figures["cold_first_command"] = await first_commands(cold_runs, cpus, warm=False)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--cold-runs", type=int, default=5)
    parser.add_argument("--execs", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--cpus", type=int, default=2)
    chosen = parser.parse_args()
    run = main(chosen.runs, chosen.cold_runs, chosen.execs, chosen.at_once, chosen.cpus)
    print(json.dumps(asyncio.run(run), indent=2))
