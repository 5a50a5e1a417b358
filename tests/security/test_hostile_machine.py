"""A real machine whose agent is the attacker's (hostile_agent.c), beside a healthy one in the same process.

Judged from the host: the hostile sandbox ends with a reason in bounded time, QEMU is gone, the host's memory stays, and
the neighbour answers before, meanwhile and after.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.peak import Peak
from tests.support.processes import is_alive
from tests.support.waiting import PATIENCE_S

from taskvm import GuestProtocolError, Sandbox, SandboxLostError
from taskvm.paths import cache_dir
from taskvm.vm import control as control_module
from taskvm.vm.qemu import host_arch

pytestmark = pytest.mark.vm

ROOT = Path(__file__).parent.parent.parent
FLAGS = ["-std=c11", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]


@pytest.fixture(scope="module")
def hostile_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent as scripts/build-native makes it, but for exec.c."""
    program = tmp_path_factory.mktemp("hostile") / f"taskvm-guest-{host_arch()}"
    compiler = os.environ.get("GUEST_CC") or shutil.which("musl-gcc") or "cc"
    sources = [str(ROOT / "tests" / "security" / "hostile_agent.c")]
    sources += [str(each) for each in (ROOT / "guest").glob("*.c") if each.name != "exec.c"]
    subprocess.run([*compiler.split(), *FLAGS, "-o", str(program), *sources], check=True)
    return program


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """This user's images, and templates of this module's own: nobody else may ever start from one."""
    usual, cache = cache_dir(), tmp_path_factory.mktemp("cache")
    cache.chmod(0o700)
    for name in ("images", "refs"):
        (cache / name).symlink_to(usual / name)
    yield cache
    shutil.rmtree(cache)


@pytest.fixture
async def hostile(hostile_agent: Path, own_cache: Path) -> AsyncIterator[Sandbox]:
    """A running sandbox that does what an attacker wants, when it is asked to run `hostile`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taskvm.wanted.guest_binary", lambda _arch: hostile_agent)
        patch.setenv("TASKVM_CACHE", str(own_cache))
        vm = await Sandbox.create(**GUEST)
    async with vm:
        assert (await vm.exec("echo honest")).stdout == "honest\n"
        yield vm


@asynccontextmanager
async def healthy_beside(vm: Sandbox) -> AsyncIterator[None]:
    """The neighbour answers before, after, and again and again meanwhile."""

    async def go_on() -> None:
        while True:
            assert (await vm.exec(["echo", "well"])).stdout == "well\n"

    assert (await vm.exec(["echo", "well"])).stdout == "well\n"
    async with asyncio.TaskGroup() as group:  # an answer that is wrong fails the test
        going_on = group.create_task(go_on())
        yield
        going_on.cancel()
    assert (await vm.exec(["echo", "well"])).stdout == "well\n"


async def gone(vm: Sandbox, supervisor: int) -> bool:
    await vm.close()
    return not is_alive(supervisor)


@pytest.mark.parametrize("what", ["replay", "huge", "noise", "pour"])
async def test_an_agent_that_breaks_the_protocol_loses_only_its_own_machine(
    vm: Sandbox, hostile: Sandbox, what: str
) -> None:
    """A second reply, a frame of 4 GiB, bytes without end that are no frames, output beyond all credit."""
    supervisor, peak = hostile.host_pid, Peak()
    async with healthy_beside(vm), asyncio.timeout(PATIENCE_S):
        with pytest.raises((SandboxLostError, GuestProtocolError)) as caught:
            await (await hostile.spawn(["hostile", what])).wait()  # nobody reads its output

    assert str(caught.value).isprintable()
    assert hostile.state == "lost"
    assert await gone(hostile, supervisor)
    assert peak.growth_mib() < 32


@pytest.mark.parametrize("what", ["stall", "half"])
async def test_an_agent_that_falls_silent_is_lost_in_bounded_time(
    vm: Sandbox, hostile: Sandbox, what: str
) -> None:
    """Nothing at all, or the beginning of a megabyte: what waits for it ends with a reason."""
    supervisor, control = hostile.host_pid, hostile._guest.control
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control_module, "REPLY_TIMEOUT_S", 0.5)
        # Not the neighbour's, which may be slow on a busy machine.
        patch.setattr(control, "probe", partial(control.probe, timeout_s=0.5))
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(SandboxLostError, match="did not answer"):
                await hostile.exec(["hostile", what])

    assert hostile.state == "lost"
    assert await gone(hostile, supervisor)
    assert (await vm.exec(["echo", "well"])).stdout == "well\n"


async def test_a_flood_that_keeps_to_the_protocol_starves_no_neighbour(
    vm: Sandbox, hostile: Sandbox
) -> None:
    """Ends of an output without end: not kept, not in the neighbour's way, and over when the sandbox is closed."""
    supervisor = hostile.host_pid
    async with asyncio.timeout(PATIENCE_S):
        process = await hostile.spawn(["hostile", "flood"])
        assert await process.stdout.read() == b""
        peak = Peak()
        for _ in range(20):
            assert (await vm.exec(["echo", "well"])).stdout == "well\n"

        assert await gone(hostile, supervisor)

    assert peak.growth_mib() < 32
