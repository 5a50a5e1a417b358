"""The life of a taskvm.sandbox: clear errors, nothing left behind, nothing on the host instead."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.processes import children_of, is_alive, qemu_of
from tests.support.waiting import PATIENCE_S, until

from taskvm import (
    HostDir,
    HostError,
    NotInstalledError,
    Sandbox,
    SandboxLostError,
    SandboxStateError,
    UnavailableError,
    UsageError,
)
from taskvm.paths import cache_path
from taskvm.vm.rundir import run_base, sweep

pytestmark = pytest.mark.vm


async def test_closing_leaves_no_process_and_no_directory() -> None:
    """After `close` neither QEMU nor a file of the sandbox is there."""
    async with Sandbox.create(**GUEST) as vm:
        supervisor = vm.host_pid
        qemu = qemu_of(supervisor)
        directory = run_base() / vm.id
        there = directory.is_dir()

    assert there
    await until(lambda: not is_alive(supervisor) and not is_alive(qemu))
    assert not directory.exists()


async def test_a_closed_sandbox_says_so() -> None:
    """Using a closed sandbox is an error that names its state; closing twice is not."""
    vm = await Sandbox.create(**GUEST)
    await vm.close()
    await vm.close()

    with pytest.raises(SandboxStateError, match="closed"):
        await vm.exec(["true"])


async def test_a_close_that_is_cancelled_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it still writes the mounts back, which may take long; and one that comes second waits for the end."""
    vm = await Sandbox.create(**GUEST, mounts={"/workspace": HostDir(tmp_path)})
    supervisor, directory = vm.host_pid, run_base() / vm.id
    flushing, never = asyncio.Event(), asyncio.Event()

    async def flush() -> None:
        flushing.set()
        await never.wait()

    monkeypatch.setattr(vm._guest, "flush", flush)
    async with asyncio.TaskGroup() as group:
        closing = group.create_task(vm.close())
        await flushing.wait()
        closing.cancel()
        await vm.close()
        there = is_alive(supervisor), directory.exists()

    assert closing.cancelled()
    assert there == (False, False)


async def test_a_killed_qemu_is_reported_in_bounded_time(vm: Sandbox) -> None:
    """A running command fails when its machine dies, and so does the next one."""
    running = asyncio.get_running_loop().create_task(vm.exec("sleep 600"))
    await vm.exec(["true"])
    os.kill(qemu_of(vm.host_pid), signal.SIGKILL)

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.wait([running])
    with pytest.raises(SandboxLostError):
        running.result()
    with pytest.raises(SandboxLostError):
        await vm.exec(["true"])
    assert vm.state == "lost"
    assert repr(vm) == f"<Sandbox {vm.id} lost>"


async def test_a_guest_that_powers_off_is_lost(vm: Sandbox) -> None:
    """A root of the guest may end its machine; the host sees it at once."""
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(SandboxLostError):
            await vm.exec("echo o > /proc/sysrq-trigger; sleep 600", user="root")


async def test_a_killed_host_process_leaves_nothing_running(tmp_path: Path) -> None:
    """`kill -9` of the program that holds a sandbox ends QEMU; the next start removes its directory."""
    program = (
        "import asyncio\nfrom taskvm import Sandbox\n"
        f"async def main():\n    vm = await Sandbox.create(**{GUEST!r})\n"
        "    await vm.spawn('sleep 600')\n    print(vm.host_pid, vm.id, flush=True)\n"
        "    await asyncio.sleep(600)\nasyncio.run(main())"
    )
    host = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    supervisor_text, sandbox = (await asyncio.to_thread(host.stdout.readline)).split()
    supervisor = int(supervisor_text)
    qemu = qemu_of(supervisor)

    host.kill()
    host.wait()
    host.stdout.close()
    await until(lambda: not is_alive(supervisor) and not is_alive(qemu))
    sweep(run_base())

    await until(lambda: not (run_base() / sandbox).exists())  # somebody else may be sweeping


async def test_a_living_neighbour_is_not_swept(vm: Sandbox) -> None:
    """Sweeping removes only what nobody holds."""
    removed = sweep(run_base())

    assert vm.id not in removed
    assert (await vm.exec(["true"])).ok


async def test_missing_qemu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without QEMU no sandbox starts, and the error says how to get it."""
    monkeypatch.setenv("PATH", "/nonexistent")

    with pytest.raises(NotInstalledError, match="apt-get install qemu"):
        await Sandbox.create(**GUEST)


async def test_kvm_that_does_not_work_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """accel="kvm" never falls back silently."""
    monkeypatch.setattr("taskvm.vm.accel.KVM_DEVICE", Path("/nonexistent/kvm"))

    with pytest.raises(UnavailableError, match="/nonexistent/kvm"):
        await Sandbox.create(**GUEST, accel="kvm")


async def test_a_full_disk_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache on a disk without room names the disk, and nothing is left half made."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system to fill")
    try:
        shutil.copytree(cache_path() / "images", small / "images", symlinks=True)
    except (OSError, shutil.Error):
        shutil.rmtree(small / "images", ignore_errors=True)
    try:
        (small / "fill").write_bytes(b"x" * 2_500_000)
        monkeypatch.setenv("TASKVM_CACHE", str(small))
        with pytest.raises(HostError):
            await Sandbox.create(**GUEST)
        left = [path for path in small.rglob("*") if path.is_file() and path.name != "fill"]
        assert not [path for path in left if path.stat().st_size > 100_000]
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


@pytest.mark.parametrize(
    "options",
    [
        {"cpus": 0},
        {"memory_mib": 16},
        {"allow": ["*"]},
        {"mounts": {"relative": None}},
        {"mounts": {"/etc": None}},
        {"env": {"BAD NAME": "x"}},
    ],
)
async def test_bad_options_are_refused_before_anything_starts(
    options: dict[str, object], workspace: Path
) -> None:
    """A wrong option is a UsageError that names it."""
    if "mounts" in options:
        options = {"mounts": dict.fromkeys(options["mounts"], HostDir(workspace))}  # type: ignore[call-overload]  # the table's
    with pytest.raises(UsageError):
        await Sandbox.create(**{**GUEST, **options})  # type: ignore[arg-type]


async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    """Cancelling `create` at any point ends what it had begun: no process of ours runs, no directory is held."""
    before = children_of(os.getpid())
    for delay in (0.0, 0.02, 0.05, 0.1, 0.15):
        task = asyncio.get_running_loop().create_task(_create())
        await asyncio.sleep(delay)
        task.cancel()
        done, _ = await asyncio.wait([task])
        for finished in done:
            if not finished.cancelled() and finished.exception() is None:
                await finished.result().close()

    assert set(children_of(os.getpid())) <= set(before)
    assert [target for target in _open_files() if target.startswith(str(run_base()))] == []


def _open_files() -> Iterator[str]:
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            yield str(path.readlink())


async def _create() -> Sandbox:
    return await Sandbox.create(**GUEST)


async def test_the_first_command_answers_soon_after_the_fork() -> None:
    """A hang limit: a warm start takes tenths of a second."""
    async with asyncio.timeout(PATIENCE_S), Sandbox.create(**GUEST) as vm:
        assert (await vm.exec(["true"])).ok
