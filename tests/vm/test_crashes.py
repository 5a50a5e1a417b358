"""What ends badly ends soon, says why, and leaves nothing: QEMU stopped, killed or without a disk to write to."""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp import QMPClient, Runstate
from tests.conftest import GUEST
from tests.support.processes import children_of, is_alive, qemu_of
from tests.support.small_disk import MIB, fill
from tests.support.waiting import PATIENCE_S, until

from taskvm import (
    HostError,
    Sandbox,
    SandboxLostError,
    TaskvmError,
    UnavailableError,
    sandbox,
    watch,
)
from taskvm.paths import cache_dir
from taskvm.vm import control, machine
from taskvm.vm.rundir import run_base

pytestmark = pytest.mark.vm

# A build asks for 5/4 of the guest's 256 MiB.
SMALL_BYTES = 450 * MIB


def machines() -> set[str]:
    """The directories of sandboxes in this cache and the running QEMUs of this process."""
    return {path.name for path in run_base().iterdir()} | set(map(str, children_of(os.getpid())))


async def test_a_stopped_qemu_fails_a_request_in_bounded_time(
    vm: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing answers and nothing is closed: the request ends by itself, and so does `close`."""
    monkeypatch.setattr(control, "REPLY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(control, "PROBE_TIMEOUT_S", 1.5)
    qemu = qemu_of(vm.host_pid)
    os.kill(qemu, signal.SIGSTOP)

    with pytest.raises(SandboxLostError, match=r"did not answer within 1\.5 s"):
        await vm.exec(["true"])
    assert vm.state == "lost"
    with pytest.raises(SandboxLostError, match=r"did not answer within 1\.5 s"):
        await vm.files.stat("/etc/passwd")
    async with asyncio.timeout(PATIENCE_S):
        await vm.close()
        await until(lambda: not is_alive(qemu))


async def test_a_time_limit_holds_for_the_start_of_a_command_too(
    vm: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that never says that the command runs is dead, and is found out by the command's own limit."""
    monkeypatch.setattr(sandbox, "KILL_TIMEOUT_S", 1.0)
    os.kill(qemu_of(vm.host_pid), signal.SIGSTOP)

    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(SandboxLostError, match="did not answer within"):
            await vm.exec(["true"], timeout_s=0.5)

    assert vm.state == "lost"


async def test_a_running_command_notices_that_its_guest_has_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without any limit of its own, too: a guest that something waits for must show that it is alive."""
    monkeypatch.setattr(watch, "HEARTBEAT_S", 0.3)
    async with Sandbox.create(**GUEST) as vm:
        process = await vm.spawn("sleep 600")
        os.kill(qemu_of(vm.host_pid), signal.SIGSTOP)
        monkeypatch.setattr(control, "PROBE_TIMEOUT_S", 1.0)

        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(SandboxLostError, match="did not answer within"):
                await process.wait()


async def test_a_stopped_qemu_ends_at_its_limit_all_the_same() -> None:
    """max_duration_s needs no answer from anybody."""
    async with Sandbox.create(**GUEST, max_duration_s=10.0) as vm:
        qemu = qemu_of(vm.host_pid)
        os.kill(qemu, signal.SIGSTOP)

        with pytest.raises(SandboxLostError, match="max_duration_s=10"):
            await vm.exec("true")
        await until(lambda: not is_alive(qemu))


async def test_a_qemu_that_stops_while_it_is_paused_is_lost_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command that would have woken the guest fails in bounded time."""
    async with Sandbox.create(**GUEST, idle_pause_s=0.2) as vm:
        await until(lambda: vm.statistics().paused)
        monkeypatch.setattr(machine, "QMP_TIMEOUT_S", 1.0)
        os.kill(qemu_of(vm.host_pid), signal.SIGSTOP)

        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(SandboxLostError):
                await vm.exec(["true"])
        assert vm.state == "lost"


async def test_a_qemu_killed_while_paused_is_lost_at_once() -> None:
    async with Sandbox.create(**GUEST, idle_pause_s=0.2) as vm:
        await until(lambda: vm.statistics().paused)
        os.kill(qemu_of(vm.host_pid), signal.SIGKILL)
        with pytest.raises(SandboxLostError):
            await vm.exec(["true"])


async def test_the_error_says_how_qemu_ended(vm: Sandbox) -> None:
    """What waits for the guest, and what comes later, both learn of the signal."""
    process = await vm.spawn("sleep 600")
    os.kill(qemu_of(vm.host_pid), signal.SIGKILL)

    for attempt in (process.wait(), vm.exec(["true"]), vm.checkpoint("never")):
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(TaskvmError, match="QEMU was ended by SIGKILL"):
                await attempt


async def test_a_qemu_that_ends_as_soon_as_it_is_up_is_an_error_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between its greeting and the first look at it, as on a disk that fills."""
    establish, before = QMPClient._establish_session, set(children_of(os.getpid()))

    async def establish_and_end(client: QMPClient) -> None:
        await establish(client)
        (supervisor,) = set(children_of(os.getpid())) - before
        os.kill(qemu_of(supervisor), signal.SIGKILL)
        await until(lambda: client.runstate != Runstate.RUNNING)

    monkeypatch.setattr(QMPClient, "_establish_session", establish_and_end)

    with pytest.raises(UnavailableError, match="QEMU did not come up"):
        await Sandbox.create(**GUEST)
    assert set(children_of(os.getpid())) <= before


@pytest.fixture
def small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache on a file system of its own, with this user's images and room for one template."""
    usual = cache_dir()
    image, small = tmp_path / "disk.img", tmp_path / "small"
    small.mkdir()
    with image.open("wb") as stream:
        stream.truncate(SMALL_BYTES)
    # Not a tmpfs: its holes take room when they are read, so that QEMU would die of another template's memory.
    # mke2fs is not in an ordinary user's PATH.
    system = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(
        ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image], check=True, env=system
    )
    if subprocess.run(["mount", "-o", "loop", image, small], check=False, env=system).returncode:
        pytest.skip("this user may not mount a small file system to fill")
    try:
        for name in ("images", "refs"):
            (small / name).symlink_to(usual / name)
        monkeypatch.setenv("TASKVM_CACHE", str(small))
        yield small
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


async def test_a_disk_that_fills_during_a_template_build_fails_the_start_and_leaves_nothing(
    small_cache: Path,
) -> None:
    """The build had room when it began. QEMU cannot write the guest's memory any more."""

    async def fill_soon() -> None:
        while not list(small_cache.glob("templates/.*/ram")):
            await asyncio.sleep(0.01)
        fill(small_cache)

    before = machines()
    async with asyncio.timeout(2 * PATIENCE_S), asyncio.TaskGroup() as group:
        group.create_task(fill_soon())
        with pytest.raises(HostError, match="the disk is full|No space left"):
            await Sandbox.create(**GUEST, accel="tcg", free_disk_mib=0)
    (small_cache / "filler").unlink()

    assert machines() <= before
    assert not list(small_cache.glob("templates/*/")) + list(small_cache.glob("templates/.*/"))
    assert shutil.disk_usage(small_cache).used < 20 * MIB


async def test_a_full_disk_at_a_start_from_a_template_is_a_clear_error(small_cache: Path) -> None:
    """Neither the floor nor, without it, the overlay that finds no room leaves anything."""
    async with Sandbox.create(**GUEST, accel="tcg", free_disk_mib=0) as vm:
        await vm.exec(["true"])
    fill(small_cache)
    before = machines()

    with pytest.raises(HostError, match="free_disk_mib=64 must remain"):
        await Sandbox.create(**GUEST, accel="tcg", free_disk_mib=64)
    with pytest.raises(HostError, match="Free disk space"):
        await Sandbox.create(**GUEST, accel="tcg", free_disk_mib=0)

    assert machines() <= before
    assert not list((small_cache / "run").iterdir())


async def test_a_full_disk_under_a_running_guest_is_an_error_in_the_guest(
    small_cache: Path,
) -> None:
    """Without a floor the guest's writes fail; its machine is not silently stopped."""
    async with Sandbox.create(**GUEST, accel="tcg", free_disk_mib=0) as vm:
        fill(small_cache)

        written = await vm.exec(
            "dd if=/dev/urandom of=/var/fill bs=1M count=20 conv=fsync",
            user="root",
            timeout_s=PATIENCE_S,
        )

        assert written.exit_code == 1
        assert (await vm.exec(["true"])).ok
