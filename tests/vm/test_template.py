"""Warm templates: forks are fast to get, apart from each other, fresh in what must be fresh, and never write back."""

import asyncio
import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.waiting import PATIENCE_S

from taskvm import HostError, Sandbox
from taskvm.paths import cache_dir

pytestmark = pytest.mark.vm


@pytest.fixture
def own_layout(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A number that only this test's templates carry: other tests remove and replace those that all share."""
    layout = 900_000_000 + os.getpid()
    monkeypatch.setattr("taskvm.vm.template.LAYOUT", layout)
    yield layout
    for folder in folders_of(layout):
        shutil.rmtree(folder, ignore_errors=True)  # another test's start may remove it as old


def folders_of(layout: int) -> list[Path]:
    """The finished templates of one layout; one whose name has a dot is being built."""
    found = []
    for manifest in (cache_dir() / "templates").glob("[!.]*/manifest.json"):
        with contextlib.suppress(FileNotFoundError):  # another test's, removed since it was listed
            if b'"layout":%d,' % layout in manifest.read_bytes():
                found.append(manifest.parent)
    return found


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file that guests are forked from."""
    names = ("disk.qcow2", "ram", "state")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


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
    before = time.time()
    async with Sandbox.create(**GUEST) as vm:
        said = float((await vm.exec(["date", "+%s.%N"])).stdout)

    # Behind by as long as it took to tell the guest.
    assert before <= said <= time.time() + 1


async def test_a_fork_never_writes_to_its_template(own_layout: int) -> None:
    """A guest that dirties its memory and its disk leaves every file of the template as it was."""
    async with Sandbox.create(
        **GUEST
    ):  # it holds the template, which another start might remove as old
        (folder,) = folders_of(own_layout)
        before = digests(folder)

        async with Sandbox.create(**GUEST) as vm:
            await vm.exec(
                "head -c 60M /dev/urandom > /root/fill; dd if=/dev/zero of=/dev/shm/fill bs=1M count=60; "
                "rm -rf /usr/share; sync; echo 3 > /proc/sys/vm/drop_caches",
                user="root",
                timeout_s=2 * PATIENCE_S,
            )
            async with Sandbox.create(**GUEST) as other:
                beside = await other.exec("ls -d /usr/share")
        after = digests(folder)

    assert beside.stdout == "/usr/share\n"
    assert after == before


async def test_starts_at_the_same_time_share_one_template() -> None:
    """Concurrent starts all succeed and build nothing twice."""
    sandboxes = await asyncio.gather(*(Sandbox.create(**GUEST) for _ in range(4)))
    answers = await asyncio.gather(*(vm.exec(["hostname"]) for vm in sandboxes))
    await asyncio.gather(*(vm.close() for vm in sandboxes))

    assert len({answer.stdout for answer in answers}) == 4


async def test_a_damaged_template_is_rebuilt(own_layout: int) -> None:
    """A template whose files do not match its manifest is not started from."""
    said: list[str] = []
    async with Sandbox.create(**GUEST):
        pass
    (folder,) = folders_of(own_layout)
    state = folder / "state"
    state.chmod(0o600)
    state.write_bytes(b"not a state")

    async with Sandbox.create(**GUEST, on_progress=said.append) as vm:
        answer = await vm.exec(["echo", "fine"])

    assert answer.stdout == "fine\n"
    assert any("booting" in line for line in said)


async def test_a_guest_too_slow_to_be_warmed_is_an_error_with_the_reason(
    own_layout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskvm.vm.boot.WARM_UP_TIMEOUT_S", 0.0)
    monkeypatch.setattr("taskvm.vm.boot.WARM_UP", b"sleep 600")  # its end may be there at once

    with pytest.raises(HostError, match="first programs did not end in 0 s.*less to do"):
        await Sandbox.create(**GUEST)

    assert folders_of(own_layout) == []


async def test_a_cold_start_works_too() -> None:
    """warm=False boots and gives the same sandbox."""
    async with Sandbox.create(**GUEST, warm=False) as vm:
        result = await vm.exec("cat /etc/machine-id; hostname")

    assert result.stdout.splitlines()[1] == vm.id
