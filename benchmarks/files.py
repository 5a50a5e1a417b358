"""What work on a mounted folder costs: seconds, processor time of host and QEMU, and requests by kind. Prints JSON.

    python benchmarks/files.py [--only NAME ...] [--no-limit] [--memory-mib 512]

Each workload runs on a mount (`direct`, or `ro` where it says so) and on the guest's own tmpfs in the same run, which
is the limit that a file system can reach there. A cold workload reads what the host made and the guest never saw.
Compare figures of one run only; requests are exact, and each costs the guest about as much as 300 us of processor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from taskvm import HostDir, Sandbox
from taskvm.fs.session import Reply, Session
from taskvm.wire.fuse import Opcode

_OPCODE = struct.Struct("<4xI")
MEGABYTE = 1024 * 1024


@dataclass(frozen=True)
class Workload:
    """`prepare` makes what it needs in a directory of the host (or the guest's tmpfs, as a shell script)."""

    name: str
    prepare: str
    script: str
    items: int
    readonly: bool = False


TREE = "for d in $(seq {dirs}); do mkdir d$d; for f in $(seq 100); do echo line $d $f > d$d/f$f; done; done"
GIT = (
    TREE.format(dirs=30) + "; git init -q .; git -c core.fsync=none add .;"
    " git -c user.name=a -c user.email=a@localhost commit -qm one"
)
BIG = "dd if=/dev/urandom of=big bs=1M count=64 status=none"
WORKLOADS = (
    Workload("write 64 MiB, fsync", "true", "dd if=/dev/zero of=big bs=1M count=64 conv=fsync", 64),
    Workload("read 64 MiB, cold", BIG, "dd if=big of=/dev/null bs=1M", 64),
    Workload("read 64 MiB, again", BIG, "dd if=big of=/dev/null bs=1M", 64),
    Workload(
        "create 2000 files", "true", "mkdir d; for f in $(seq 2000); do echo x > d/f$f; done", 2000
    ),
    Workload(
        "rm -rf 2000 files",
        "mkdir d; cd d; for f in $(seq 2000); do echo x > f$f; done",
        "rm -rf d",
        2000,
    ),
    Workload("find over 5000, cold", TREE.format(dirs=50), "find . | wc -l", 5000),
    Workload("ls -lR of 5000, cold", TREE.format(dirs=50), "ls -lR . | wc -l", 5000),
    Workload("ls -lR of 5000, again", TREE.format(dirs=50), "ls -lR . | wc -l", 5000),
    Workload(
        "grep -r over 5000, cold, ro", TREE.format(dirs=50), "grep -r 'line 7 7$' .", 5000, True
    ),
    Workload("grep -r over 5000, cold", TREE.format(dirs=50), "grep -r 'line 7 7$' .", 5000),
    Workload("grep -r over 5000, again", TREE.format(dirs=50), "grep -r 'line 7 7$' .", 5000),
    Workload("git status of 3000, first", GIT, "git status", 3000),
    Workload("git status of 3000, again", GIT, "git status", 3000),
)


CHANGE = "host change seen by the guest"
ROUNDS = 30
# The guest looks all the time, and while it believes what it has seen that costs no request.
WATCHER = """
seen = ""
while True:
    with open("change") as file:
        now = file.read()
    if now and now != seen:
        seen = now
        print(now, flush=True)
"""


def count_requests(counts: Counter[str]) -> None:
    """Let every request that a session serves be counted."""
    handle = Session.handle

    def counted(session: Session, message: memoryview) -> Reply | None:
        counts[Opcode(_OPCODE.unpack_from(message)[0]).name] += 1
        return handle(session, message)

    Session.handle = counted  # type: ignore[method-assign]  # only a benchmark may


async def run(vm: Sandbox, script: str, directory: str) -> dict[str, float]:
    """Run `script` there; seconds of the wall, of this process and of QEMU."""
    used = (os.times(), vm.statistics().cpu_s)
    begun = time.perf_counter()
    await vm.exec(script, cwd=directory, check=True, timeout_s=300)
    seconds = time.perf_counter() - begun
    now = os.times()
    return {
        "s": round(seconds, 2),
        "server_cpu_s": round(now.user + now.system - used[0].user - used[0].system, 2),
        "qemu_cpu_s": round(vm.statistics().cpu_s - used[1], 2),
    }


def place(workload: Workload) -> str:
    """Where on the mount: a workload that runs again uses what the first one left."""
    return workload.name.partition(",")[0].replace(" ", "-") + ("-ro" if workload.readonly else "")


async def measure(
    vm: Sandbox, workload: Workload, root: Path, counts: Counter[str]
) -> dict[str, object]:
    """One workload on the mount."""
    directory = root / place(workload)
    if not directory.exists():
        directory.mkdir(parents=True)
        shell = ["sh", "-c", workload.prepare]
        await asyncio.to_thread(subprocess.run, shell, cwd=directory, check=True)
    counts.clear()
    mount = "/ro" if workload.readonly else "/workspace"
    figures: dict[str, object] = dict(await run(vm, workload.script, f"{mount}/{place(workload)}"))
    figures["requests"] = dict(counts.most_common())
    figures["requests_per_item"] = round(counts.total() / workload.items, 2)
    return figures


async def measure_limit(vm: Sandbox, workload: Workload) -> dict[str, float]:
    """The same on the guest's tmpfs."""
    directory = f"/mnt/{place(workload)}"
    await vm.exec(
        f"test -d {directory} || {{ mkdir {directory}; cd {directory}; {workload.prepare}; }}",
        check=True,
    )
    return await run(vm, workload.script, directory)


async def measure_change(vm: Sandbox, root: Path) -> dict[str, float]:
    """From the write on the host until the word of a program of the guest that reads the file."""
    (root / "change").write_text("0")
    took = []
    async with await vm.spawn(["python3", "-c", WATCHER], cwd="/workspace") as watcher:
        words = watcher.stdout.__aiter__()
        await anext(words)
        for number in range(1, ROUNDS + 1):
            await asyncio.sleep(0.2)
            begun = time.perf_counter()
            (root / "change").write_text(str(number))
            while str(number).encode() not in await anext(words):
                pass
            took.append(time.perf_counter() - begun)
    return {"median_s": round(statistics.median(took), 3), "worst_s": round(max(took), 3)}


async def main(only: list[str], cpus: int, memory_mib: int, *, limit: bool) -> dict[str, object]:
    figures: dict[str, object] = {}
    counts: Counter[str] = Counter()
    count_requests(counts)
    root = Path(tempfile.mkdtemp(prefix="taskvm-files-"))
    mounts = {"/workspace": HostDir(root), "/ro": HostDir(root, mode="ro")}
    chosen = [w for w in WORKLOADS if not only or any(word in w.name for word in only)]
    try:
        async with Sandbox.create(cpus=cpus, memory_mib=memory_mib, mounts=mounts) as vm:
            await vm.exec("mount -t tmpfs -o mode=1777,size=80% none /mnt", user="root", check=True)
            # The kernel learns at its first OPEN that it need not ask.
            (root / "opened").touch()
            await vm.exec(
                "git config --global --add safe.directory '*'; grep x /workspace/opened /ro/opened; true"
            )
            for workload in chosen:
                figures[workload.name] = await measure(vm, workload, root, counts)
                if limit:
                    figures[workload.name] |= {"tmpfs": await measure_limit(vm, workload)}  # type: ignore[operator]
                print(workload.name, json.dumps(figures[workload.name]), flush=True)
            if not only or any(word in CHANGE for word in only):
                figures[CHANGE] = await measure_change(vm, root)
                print(CHANGE, json.dumps(figures[CHANGE]), flush=True)
    finally:
        shutil.rmtree(root)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--no-limit", action="store_true")
    parser.add_argument("--memory-mib", type=int, default=512)
    parser.add_argument("--cpus", type=int, default=2)
    given = parser.parse_args()
    asyncio.run(main(given.only, given.cpus, given.memory_mib, limit=not given.no_limit))
