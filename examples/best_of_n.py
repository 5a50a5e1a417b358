"""Best of n: one prepared sandbox, n copies that each try something, and the best result kept.

    python examples/best_of_n.py [N]

The attempts here are shell commands that sort badly or well; put an agent in their place. What is prepared once
(files, installed tools, a warm interpreter) every copy has in memory already.
"""

from __future__ import annotations

import asyncio
import sys

from taskvm import Sandbox

PREPARE = (
    "mkdir -p /work && cd /work && seq 20000 | shuf --random-source=/usr/bin/python3 > numbers"
)
ATTEMPTS = (
    "sort -n numbers > sorted",
    "sort numbers > sorted",  # as text: wrong
    'python3 -c \'print(*sorted(map(int, open("numbers"))), sep="\\n")\' > sorted',
    "cat numbers > sorted",
)
CHECK = "seq 20000 | cmp -s - sorted"


async def attempt(child: Sandbox, number: int) -> tuple[bool, float, str]:
    """Let one copy try, and judge what it made."""
    command = ATTEMPTS[number % len(ATTEMPTS)]
    async with child:
        tried = await child.exec(command, cwd="/work", timeout_s=60)
        good = tried.ok and (await child.exec(CHECK, cwd="/work")).ok
        usage = tried.usage
        return good, usage.user_s + usage.system_s if usage else 0.0, command


async def main(count: int) -> None:
    async with Sandbox.create() as base:
        await base.exec(PREPARE, check=True, user="root")
        await base.exec("chmod -R a+rwX /work", check=True, user="root")
        forked = await base.fork_many(count)
        children = [child for child in forked if isinstance(child, Sandbox)]
        results = await asyncio.gather(*map(attempt, children, range(len(children))))
    for good, cpu_s, command in sorted(results, key=lambda each: (not each[0], each[1])):
        print(f"{'good' if good else 'bad ':4}  {cpu_s:5.2f} s  {command}")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 4))
