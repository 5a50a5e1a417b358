"""Guests started ahead.

Covers taskvm.pool, taskvm.guest, taskvm.launch, taskvm.wanted, taskvm.vm.warm, taskvm.vm.boot and taskvm.vm.disk.
"""

import asyncio
import time

import pytest
from tests.conftest import GUEST

from taskvm import Sandbox, SandboxStateError, UsageError, WarmPool

pytestmark = pytest.mark.vm
HOUR_S = 3600


async def test_a_guest_from_the_pool_is_as_fresh_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time, entropy and names are right although the guest has waited, and two guests differ."""
    clock = time.time_ns
    question = "date +%s; od -An -N16 -tx1 /dev/urandom; hostname; cat /etc/machine-id"
    async with WarmPool(size=2, **GUEST) as pool:
        await pool.wait_full()
        monkeypatch.setattr(time, "time_ns", lambda: clock() + HOUR_S * 10**9)  # as if for an hour
        before = time.time()
        async with (
            Sandbox.create(**GUEST, pool=pool) as one,
            Sandbox.create(**GUEST, pool=pool) as two,
        ):
            first = (await one.exec(question)).stdout.splitlines()
            after = time.time()
            second = (await two.exec(question)).stdout.splitlines()

    # Behind by as long as it took to tell the guest; in whole seconds.
    assert before - 1 <= int(first[0]) - HOUR_S <= after + 1
    assert all(left != right for left, right in zip(first[1:], second[1:], strict=True))
    assert first[2] == one.id


async def test_an_empty_pool_or_another_shape_starts_as_without_it() -> None:
    """A pool never refuses: what it does not have is started."""
    async with WarmPool(size=1, **GUEST) as pool:
        async with Sandbox.create(cpus=1, memory_mib=320, pool=pool) as other:
            assert (await other.exec(["true"])).ok
        sandboxes = await asyncio.gather(*(Sandbox.create(**GUEST, pool=pool) for _ in range(3)))
        answers = await asyncio.gather(*(vm.exec(["hostname"]) for vm in sandboxes))
        await asyncio.gather(*(vm.close() for vm in sandboxes))

    assert len({answer.stdout for answer in answers}) == 3


async def test_a_guest_that_died_waiting_is_not_handed_out() -> None:
    """The pool hands over what answers."""
    async with WarmPool(size=1, **GUEST) as pool:
        await pool.wait_full()
        await pool._ready[0].machine.kill()
        async with Sandbox.create(**GUEST, pool=pool) as vm:
            assert (await vm.exec(["echo", "alive"])).stdout == "alive\n"


async def test_a_pool_that_is_not_open_says_so() -> None:
    """Using it outside `async with` is an error with the remedy, and so is a size of nothing."""
    with pytest.raises(SandboxStateError, match="async with"):
        await Sandbox.create(**GUEST, pool=WarmPool())
    with pytest.raises(UsageError):
        WarmPool(size=0)
