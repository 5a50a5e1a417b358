"""What the supervisor costs beside a sandbox of one's own. Prints one JSON object.

    python benchmarks/supervisor.py [--rounds 30] [--mib 64]

Starts: the supervisor with its first sandbox, and one more, from the call to the answer (warm template). Commands: one
`true` from call to exit, through the supervisor and in a sandbox of this process. Output: so many MiB of zeros through
both, and the supervisor's processor time for it. Its own memory is proportional. It has a directory of its own here, so
no supervisor of yours is touched. Compare figures of one quiet machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from taskvm import Attachment, Process, Sandbox, Supervisor

CPUS, MEMORY_MIB = 1, 256
MIB = 1024 * 1024
OPTIONS: dict[str, object] = {"cpus": CPUS, "memory": MEMORY_MIB}
Begin = Callable[[list[str]], Awaitable[Attachment | Process]]


async def timed(work: Awaitable[object]) -> float:
    """Seconds that `work` takes."""
    begun = time.perf_counter()
    await work
    return time.perf_counter() - begun


async def commands(begin: Begin, rounds: int) -> float:
    """Milliseconds from the start of a command to its exit, in the median."""

    async def one() -> None:
        async with await begin(["true"]) as command:
            await command.wait()

    return 1000 * statistics.median([await timed(one()) for _ in range(rounds)])


async def output(begin: Begin, mib: int) -> float:
    """MiB of output in a second."""

    async def read() -> None:
        async with await begin(["head", "-c", f"{mib}M", "/dev/zero"]) as command:
            size = sum([len(data) async for data in command.stdout])
            await command.wait()
        assert size == mib * MIB, f"{size} bytes came"

    return mib / await timed(read())


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> float:
    """Proportional memory of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


async def measure(rounds: int, mib: int) -> dict[str, float]:
    async with Sandbox.create(cpus=CPUS, memory_mib=MEMORY_MIB) as vm:  # the template is there then
        own = await commands(vm.spawn, rounds)
        own_output = await output(vm.spawn, mib)
    supervisor = Supervisor()

    async def begin(command: list[str]) -> Attachment:
        return await supervisor.exec("bench", command)

    first_s = await timed(supervisor.start(OPTIONS, name="bench"))
    second_s = await timed(supervisor.start(OPTIONS))
    status = await supervisor.status()
    assert status is not None, "it has just started a sandbox"
    held = await commands(begin, rounds)
    before_s = cpu_s(status.pid)
    held_output = await output(begin, mib)
    figures = {
        "first_start_ms": 1000 * first_s,
        "next_start_ms": 1000 * second_s,
        "command_ms": held,
        "command_own_ms": own,
        "output_mib_s": held_output,
        "output_own_mib_s": own_output,
        "output_cpu_ms_per_mib": 1000 * (cpu_s(status.pid) - before_s) / mib,
        "list_ms": 1000 * await timed(supervisor.list()),
        "memory_mib": memory_mib(status.pid),
    }
    await supervisor.shut_down()
    return {name: round(value, 1) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--mib", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TASKVM_RUNTIME"] = directory
        print(json.dumps(asyncio.run(measure(arguments.rounds, arguments.mib)), indent=2))


if __name__ == "__main__":
    main()
