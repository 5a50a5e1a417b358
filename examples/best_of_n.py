"""Best of n: one prepared sandbox, n copies that each try something, and the best result offered to the host.

    python examples/best_of_n.py [N [DIRECTORY]]

The attempts here are shell commands that sort badly or well; put an agent in their place. What is prepared once
(files, installed tools, a warm interpreter) every copy has in memory already. The directory is mounted for review: each
copy has changes of its own, and the host's files stay as they are until somebody applies the winner's.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import dataclass

from taskvm import HostDir, Sandbox

PREPARE = "seq 20000 | shuf --random-source=/usr/bin/python3 > numbers"
ATTEMPTS = (
    "sort -n numbers > sorted",
    "sort numbers > sorted",  # as text: wrong
    'python3 -c \'print(*sorted(map(int, open("numbers"))), sep="\\n")\' > sorted',
    "cat numbers > sorted",
)
CHECK = "seq 20000 | cmp -s - sorted"


@dataclass(frozen=True)
class Attempt:
    """What one copy made of it."""

    child: Sandbox
    command: str
    good: bool
    cpu_s: float


async def attempt(child: Sandbox, number: int) -> Attempt:
    """Let one copy try, and judge what it made."""
    command = ATTEMPTS[number % len(ATTEMPTS)]
    tried = await child.exec(command, timeout_s=60)
    good = tried.ok and (await child.exec(CHECK)).ok
    usage = tried.usage
    return Attempt(child, command, good, usage.user_s + usage.system_s if usage else 0.0)


async def main(count: int, directory: str) -> None:
    mounts = {"/workspace": HostDir(directory, mode="review")}
    async with Sandbox.create(mounts=mounts) as base:
        await base.exec(PREPARE, check=True)
        forked = await base.fork_many(count)
    children = [child for child in forked if isinstance(child, Sandbox)]
    for number, failure in enumerate(forked):
        if not isinstance(failure, Sandbox):  # the others try all the same
            print(f"copy {number} did not start: {failure}", file=sys.stderr)
    try:
        attempts = await asyncio.gather(*map(attempt, children, range(len(children))))
        ranking = sorted(attempts, key=lambda each: (not each.good, each.cpu_s))
        for each in ranking:
            print(f"{'good' if each.good else 'bad ':4}  {each.cpu_s:5.2f} s  {each.command}")
        if ranking and ranking[0].good:
            with await ranking[0].child.changes() as changes:
                print(
                    "the best one changed:", *changes, sep="\n  "
                )  # changes.apply() takes it over
    finally:
        for child in children:
            await child.close()


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    with tempfile.TemporaryDirectory() as empty:
        asyncio.run(main(number, sys.argv[2] if len(sys.argv) > 2 else empty))
