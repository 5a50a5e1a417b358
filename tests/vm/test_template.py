"""Warm templates: forks are fast to get, apart from each other, fresh in what must be fresh, and never write back."""

import asyncio
import hashlib
import time
from pathlib import Path

import pytest
from tests.conftest import GUEST

from taskvm import Sandbox
from taskvm.paths import cache_dir

pytestmark = pytest.mark.vm


def templates() -> dict[str, str]:
    """The digest of every file of every template."""
    base = cache_dir() / "templates"
    return {
        str(path.relative_to(base)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(base.glob("[!.]*/*"))  # one with a dot is being built
        if path.name != "manifest.json"
    }


async def test_two_forks_share_nothing_that_must_be_unique() -> None:
    """Random numbers, host name, machine id and boot-time secrets differ between two starts of one template."""
    question = (
        "od -An -N16 -tx1 /dev/urandom; cat /etc/machine-id; hostname; "
        "python3 -c 'import os, uuid; print(os.urandom(8).hex(), uuid.uuid4())'"
    )
    async with Sandbox.create(**GUEST) as one, Sandbox.create(**GUEST) as two:
        first, second = await asyncio.gather(one.exec(question), two.exec(question))

    assert first.ok
    pairs = zip(first.stdout.splitlines(), second.stdout.splitlines(), strict=True)
    assert all(left != right for left, right in pairs)


async def test_the_clock_is_the_hosts() -> None:
    """A guest that was saved long ago knows the time at its first command."""
    async with Sandbox.create(**GUEST) as vm:
        before = time.time()
        said = float((await vm.exec(["date", "+%s.%N"])).stdout)

    assert (
        before - 10 <= said <= time.time() + 1
    )  # behind by as long as its first command took to get there


async def test_a_fork_never_writes_to_its_template() -> None:
    """A guest that dirties its memory and its disk leaves every file of the template as it was."""
    async with Sandbox.create(**GUEST):
        pass
    before = templates()

    async with Sandbox.create(**GUEST) as vm:
        await vm.exec(
            "head -c 60M /dev/urandom > /root/fill; dd if=/dev/zero of=/dev/shm/fill bs=1M count=60; "
            "rm -rf /usr/share; sync; echo 3 > /proc/sys/vm/drop_caches",
            user="root",
            timeout_s=120,
        )
        async with Sandbox.create(**GUEST) as other:
            beside = await other.exec("ls -d /usr/share")

    assert beside.stdout == "/usr/share\n"
    after = templates()  # other tests may have made more
    assert {name: after.get(name) for name in before} == before


async def test_starts_at_the_same_time_share_one_template() -> None:
    """Concurrent starts all succeed and build nothing twice."""
    sandboxes = await asyncio.gather(*(Sandbox.create(**GUEST) for _ in range(4)))
    answers = await asyncio.gather(*(vm.exec(["hostname"]) for vm in sandboxes))
    await asyncio.gather(*(vm.close() for vm in sandboxes))

    assert len({answer.stdout for answer in answers}) == 4


async def test_a_damaged_template_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template whose files do not match its manifest is not started from."""
    said: list[str] = []
    monkeypatch.setattr("taskvm.vm.template.LAYOUT", 999_001)  # a template of this test's own
    async with Sandbox.create(**GUEST):
        pass
    (state,) = [
        path
        for path in (cache_dir() / "templates").glob("*/state")
        if b"999001" in (path.parent / "manifest.json").read_bytes()
    ]
    state.chmod(0o600)
    state.write_bytes(b"not a state")

    async with Sandbox.create(**GUEST, on_progress=said.append) as vm:
        answer = await vm.exec(["echo", "fine"])
    for path in state.parent.iterdir():
        path.unlink()
    state.parent.rmdir()

    assert answer.stdout == "fine\n"
    assert any("booting" in line for line in said)


async def test_a_cold_start_works_too() -> None:
    """warm=False boots and gives the same sandbox."""
    async with Sandbox.create(**GUEST, warm=False) as vm:
        result = await vm.exec("cat /etc/machine-id; hostname")

    assert result.stdout.splitlines()[1] == vm.id
