"""What work costs in a directory under review, beside a shared one and the guest's own tmpfs. Prints JSON.

    python benchmarks/review.py [--files 500]

All three in one sandbox, one after the other: seconds, and requests to the host. Then what it takes to bring the
changes to the host, and to apply them. Compare figures of one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import tempfile
import time
from pathlib import Path

from taskvm import HostDir, Sandbox

GIT = "git -c user.name=a -c user.email=a@localhost -c core.fsync=none"
# Each begins where the one before it ended, in a repository of `files` committed files.
SCRIPTS = {
    "create": "mkdir made; for f in $(seq {files}); do echo x > made/f$f; done",
    "git status": "git status --short | wc -l",
    "grep -r": "grep -r 'line 7$' . | wc -l",
    "rename a directory": "mv made renamed",
    "rm -rf": "rm -rf renamed",
}


def prepare(root: Path, files: int) -> None:
    """Make a repository of `files` files."""
    script = (
        f"for f in $(seq {files}); do mkdir -p d$((f % 50)); echo line $f > d$((f % 50))/f$f; done; "
        f"{GIT} init -q .; {GIT} add .; {GIT} commit -qm one"
    )
    subprocess.run(["sh", "-c", script], cwd=root, check=True)


async def measure(vm: Sandbox, directory: str, files: int) -> dict[str, float]:
    """Seconds of each script there."""
    figures = {}
    for name, script in SCRIPTS.items():
        begun = time.perf_counter()
        await vm.exec(script.format(files=files), cwd=directory, check=True, timeout_s=600)
        figures[name] = round(time.perf_counter() - begun, 2)
    return figures


async def bring(vm: Sandbox, files: int) -> dict[str, float]:
    """Seconds to take a set of `files` new files, to show it, and to apply it."""
    await vm.exec(SCRIPTS["create"].format(files=files), cwd="/review", check=True)
    marks = [time.perf_counter()]
    with await vm.changes("/review") as changes:
        marks.append(time.perf_counter())
        changes.diff()
        marks.append(time.perf_counter())
        changes.apply()
        marks.append(time.perf_counter())
    steps = zip(("take", "diff", "apply"), marks, marks[1:], strict=False)
    return {name: round(after - before, 2) for name, before, after in steps}


async def main(files: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="taskvm-review-") as name:
        shared, reviewed = Path(name, "shared"), Path(name, "reviewed")
        for root in (shared, reviewed):
            root.mkdir()
            prepare(root, files)
        mounts = {"/shared": HostDir(shared), "/review": HostDir(reviewed, mode="review")}
        async with Sandbox.create(mounts=mounts) as vm:
            await vm.exec("git config --global --add safe.directory '*'")
            # Both trees are read once, so that neither figure has the other's first reading.
            copy = "mount -t tmpfs -o mode=1777 none /mnt; cp -a /shared /mnt/own; cp -a /review /mnt/other"
            await vm.exec(copy, user="root", check=True)
            return {
                "tmpfs": await measure(vm, "/mnt/own", files),
                "review": await measure(vm, "/review", files),
                "direct": await measure(vm, "/shared", files),
                "changes": await bring(vm, files),
            }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=500)
    print(json.dumps(asyncio.run(main(parser.parse_args().files)), indent=2))
