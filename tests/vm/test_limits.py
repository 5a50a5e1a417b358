"""taskvm.watch and taskvm.usage: a sandbox ends at its limits, rests when idle, and costs what its statistics say."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.processes import is_alive
from tests.support.waiting import PATIENCE_S, growing, until

from taskvm import ExecLimits, HostDir, HostError, Sandbox, SandboxLostError, UsageError, WarmPool
from taskvm.paths import cache_dir
from taskvm.vm.rundir import run_base

pytestmark = pytest.mark.vm

MIB = 1024 * 1024
# Much shorter than the default, much longer than a look at the guest takes.
PAUSE_S = 0.2


# The end of a life.


def test_a_run_ends_after_its_max_duration_and_says_so() -> None:
    """`taskvm run --max-duration` is the same limit, and exits as for a lost machine."""
    command = ["run", "--cpus", "1", "--memory", "256", "--max-duration", "1", "--", "sleep", "60"]
    run = subprocess.run(
        [sys.executable, "-m", "taskvm.cli", *command],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    assert run.returncode == 125
    assert "max_duration_s=1 is over" in run.stderr


def test_a_run_has_the_limits_of_its_options() -> None:
    """Of its command in the guest, and of its disk on the host."""
    script = (
        'cat "/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.max"; '
        "dd if=/dev/urandom of=/var/fill bs=1M count=150 conv=fsync"
    )
    machine = ["--cpus", "1", "--memory", "256", "--disk-limit", "48", "--free-disk", "0"]
    command = ["--user", "root", "--limit-memory", "200", "--", "sh", "-c", script]
    run = subprocess.run(
        [sys.executable, "-m", "taskvm.cli", "run", *machine, "--idle-pause", "0", *command],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    assert run.stdout == f"{200 * MIB}\n"
    assert run.returncode == 1
    assert "Input/output error" in run.stderr or "No space left" in run.stderr


async def test_a_sandbox_ends_after_its_life_whatever_runs_in_it() -> None:
    """The virtual machine is gone soon after max_duration_s, and a running command is told which limit it was."""
    async with Sandbox.create(**GUEST, max_duration_s=1.0) as vm:
        supervisor = vm.host_pid
        with pytest.raises(SandboxLostError, match="max_duration_s=1 is over"):
            await vm.exec("trap '' TERM INT HUP; while :; do :; done", user="root")

        assert vm.state == "lost"
        await until(lambda: not is_alive(supervisor))
        with pytest.raises(SandboxLostError, match="max_duration_s=1 is over"):
            await vm.exec(["true"])


async def test_a_root_that_leaves_its_commands_limits_ends_with_its_machine() -> None:
    """A cgroup binds programs, not the guest's root: past its memory and its kill, only the host ends him."""
    leave = (
        "echo $$ > /sys/fs/cgroup/cgroup.procs && head -c 60M /dev/zero | tail > /dev/null && "
        "echo past; exec setsid sleep 8421"
    )
    async with Sandbox.create(**GUEST) as vm:
        supervisor = vm.host_pid
        limits = ExecLimits(memory_mib=16)
        async with await vm.spawn(leave, user="root", limits=limits) as process:
            async with asyncio.timeout(PATIENCE_S):
                said = await process.stdout.read()
            await process.kill_all()
        # Where setsid has to fork, there are two of them at first.
        left = await vm.exec(
            "until [ $(pgrep -fc 'sleep [8]421') = 1 ]; do sleep 0.1; done", timeout_s=PATIENCE_S
        )
        await vm.close()

        assert (said, left.ok) == (b"past\n", True)
        assert not is_alive(supervisor)


async def test_an_idle_sandbox_ends_after_its_idle_timeout() -> None:
    async with Sandbox.create(**GUEST, idle_timeout_s=1.0) as vm:
        supervisor = vm.host_pid

        await until(lambda: not is_alive(supervisor))
        with pytest.raises(SandboxLostError, match="idle_timeout_s=1"):
            await vm.exec(["true"])


async def test_a_paused_sandbox_ends_after_its_idle_timeout_too() -> None:
    async with Sandbox.create(**GUEST, idle_timeout_s=10.0, idle_pause_s=PAUSE_S) as vm:
        supervisor = vm.host_pid

        await until(lambda: vm.state == "lost" or vm.statistics().paused)
        assert vm.state == "running"
        await until(lambda: not is_alive(supervisor))
        assert vm.state == "lost"


async def test_a_running_command_is_activity() -> None:
    """An exec that prints nothing for longer than the timeout keeps its sandbox."""
    async with Sandbox.create(**GUEST, idle_timeout_s=5.0) as vm:
        assert (await vm.exec("sleep 10")).ok


async def test_traffic_on_a_mount_is_activity(workspace: Path) -> None:
    """A background process that writes to a mount keeps its sandbox; when it ends, the sandbox does."""
    mounts = {"/workspace": HostDir(workspace)}
    for timeout_s in growing(2):  # a busy host may let no guest run for longer than the first
        async with Sandbox.create(**GUEST, mounts=mounts, idle_timeout_s=timeout_s) as vm:
            # The last one half a timeout after the sandbox's end, if they counted for nothing.
            write = f"for i in $(seq 16); do echo $i > n; sleep {timeout_s / 10}; done"
            await vm.exec(f"({write}) >/dev/null 2>&1 &")
            supervisor = vm.host_pid
            await until(lambda pid=supervisor: not is_alive(pid))  # type: ignore[misc]  # bound now
        if (written := (workspace / "n").read_text()) == "16\n":
            break

    assert written == "16\n"


# Rest.


async def test_an_idle_sandbox_uses_no_cpu_and_answers_the_next_command() -> None:
    """QEMU's clock in the host's books stands still; the command then runs with the time of now."""
    async with Sandbox.create(**GUEST, idle_pause_s=PAUSE_S) as vm:
        await until(lambda: vm.statistics().paused)
        before = vm.statistics().cpu_s
        await asyncio.sleep(2)
        used = vm.statistics().cpu_s - before

        begun = time.time()
        guest_time = float((await vm.exec("date +%s.%N", check=True)).stdout)
        async with await vm.spawn(["cat"]):
            paused_during = vm.statistics().paused

        assert used < 0.05
        assert begun - 1 < guest_time < time.time() + 1
        assert not paused_during


async def test_file_operations_wake_a_paused_sandbox() -> None:
    """Data that follows its request at once arrives whole and in order."""
    data = os.urandom(3 * MIB)
    async with Sandbox.create(**GUEST, idle_pause_s=PAUSE_S) as vm:
        await until(lambda: vm.statistics().paused)
        await vm.files.write_bytes("/tmp/data", data)
        await until(lambda: vm.statistics().paused)

        assert await vm.files.read_bytes("/tmp/data") == data


async def test_a_process_in_the_background_keeps_its_sandbox_awake() -> None:
    """Nobody reads the process, no exec is open: it goes on all the same."""
    async with Sandbox.create(**GUEST, idle_pause_s=PAUSE_S) as vm:
        await vm.exec(
            "(until test -e /tmp/go; do sleep 0.1; done; echo done > /tmp/end) >/dev/null 2>&1 &"
        )
        await asyncio.sleep(5 * PAUSE_S)
        paused_early = vm.statistics().paused
        await vm.files.write_text("/tmp/go", "")

        await until(lambda: vm.statistics().paused)
        assert not paused_early
        assert await vm.files.read_text("/tmp/end") == "done\n"


async def test_requests_that_meet_a_pause_at_any_moment_are_all_answered() -> None:
    """Commands come before, while and after the virtual CPUs are stopped; none is lost, none is doubled."""
    async with Sandbox.create(**GUEST, idle_pause_s=0.02) as vm:
        for number in range(40):
            await asyncio.sleep(number * 0.002)
            results = await asyncio.gather(*(vm.exec(["echo", str(number)]) for _ in range(2)))
            assert [result.stdout for result in results] == [f"{number}\n"] * 2
        await until(lambda: vm.statistics().paused)
        assert (await vm.exec(["wc", "-c"], stdin=b"x" * MIB)).stdout == f"{MIB}\n"


async def test_a_paused_sandbox_flushes_its_mounts_when_it_is_closed(workspace: Path) -> None:
    async with Sandbox.create(
        **GUEST, mounts={"/workspace": HostDir(workspace)}, idle_pause_s=PAUSE_S
    ) as vm:
        await vm.exec("echo kept > file", check=True)
        await until(lambda: vm.statistics().paused)

    assert (workspace / "file").read_text() == "kept\n"


@pytest.mark.parametrize(
    "lie",
    ["cp /etc/passwd /tmp/lie", "mkfifo /tmp/lie", "ln -s /dev/zero /tmp/lie", "echo 0 > /tmp/lie"],
)
async def test_a_guest_that_lies_about_its_processes_hurts_only_itself(lie: str) -> None:
    """It is paused or not, as it says; commands are answered."""
    file = "/sys/fs/cgroup/exec/pids.current"
    async with Sandbox.create(**GUEST, idle_pause_s=PAUSE_S) as vm:
        await vm.exec(f"{lie}; mount --bind /tmp/lie {file}", user="root")
        await vm.exec("(while :; do :; done) >/dev/null 2>&1 &")
        for _ in range(3):
            await asyncio.sleep(3 * PAUSE_S)
            assert (await vm.exec(["echo", "here"])).stdout == "here\n"


async def test_idle_pause_0_never_pauses() -> None:
    async with Sandbox.create(**GUEST, idle_pause_s=0) as vm:
        await asyncio.sleep(1)

        assert not vm.statistics().paused


# Processor.


def cgroups() -> Iterator[Path]:
    """The host's control groups, of which others come and go meanwhile."""
    for path, directories, _files in os.walk("/sys/fs/cgroup"):
        yield from (Path(path) / name for name in directories)


async def test_a_sandbox_gets_no_more_than_its_share_of_the_processor() -> None:
    """In the host's books, whatever the guest's root does; its control group goes with it."""
    try:
        vm = await Sandbox.create(**GUEST, cpu_share=0.2)
    except HostError as error:
        pytest.skip(f"no control group may be made here: {error.cause}")
    async with vm:
        begun, before = time.monotonic(), vm.statistics().cpu_s
        await vm.exec("while :; do :; done", user="root", timeout_s=3)
        passed_s = time.monotonic() - begun
        used_s = vm.statistics().cpu_s - before
        groups = [path for path in cgroups() if path.name == f"taskvm-{vm.id}"]

    assert 0 < used_s < 0.3 * passed_s
    assert len(groups) == 1
    assert not groups[0].exists()


# Disk.


async def test_a_guest_that_fills_its_disk_gets_an_error_and_the_host_keeps_its_space() -> None:
    """Its file on the host ends at the limit; the machine goes on and can still be talked to."""
    async with Sandbox.create(**GUEST, disk_limit_mib=48) as vm:
        filled = await vm.exec(
            "dd if=/dev/urandom of=/var/fill bs=1M count=150 conv=fsync", user="root"
        )
        overlay = run_base() / vm.id / "disk.qcow2"

        assert filled.exit_code == 1
        assert "error writing" in filled.stderr or "fsync failed" in filled.stderr
        assert "Input/output error" in filled.stderr or "No space left" in filled.stderr
        assert overlay.stat().st_size <= 48 * MIB
        assert vm.statistics().disk_bytes <= 49 * MIB
        assert vm.state == "running"
        assert (await vm.exec(["true"])).ok


@pytest.mark.parametrize("start", ["warm", "cold", "pool"])
async def test_a_disk_is_as_large_as_was_asked_for(start: str) -> None:
    """The guest's own file system has the room, keeps what is written there, and the host's file is still small."""
    async with contextlib.AsyncExitStack() as stack:
        pool = None
        if start == "pool":
            pool = await stack.enter_async_context(WarmPool(size=1, **GUEST))
            await pool.wait_full()
        creating = Sandbox.create(
            **GUEST, disk_size_mib=12 * 1024, warm=start != "cold", pool=pool, accel="tcg"
        )
        vm = await stack.enter_async_context(creating)
        size = await vm.exec("df --output=size -m / | tail -1; cat /sys/block/vda/size", check=True)
        written = await vm.exec(
            "fallocate -l 9G /var/large && head -c 5M /dev/urandom | tee /var/kept | sha256sum - && "
            "sync && echo 3 > /proc/sys/vm/drop_caches && sha256sum < /var/kept && dmesg | grep -i ext4.*error",
            user="root",
        )
        file_bytes = vm.statistics().disk_bytes

    file_system_mib, sectors = map(int, size.stdout.split())
    assert 0.97 * 12 * 1024 < file_system_mib <= 12 * 1024
    assert sectors * 512 == 12 * 1024 * MIB
    first, second = written.stdout.split("\n")[:2]
    assert (first, written.stderr) == (second, "")
    assert file_bytes < 100 * MIB


async def test_a_disk_smaller_than_the_image_is_refused() -> None:
    with pytest.raises(UsageError, match="its image has a disk of 4096 MiB"):
        await Sandbox.create(**GUEST, disk_size_mib=100)


async def test_a_disk_limit_holds_for_a_sandbox_with_a_pool() -> None:
    """The pool's guests have the default limit: another one is started."""
    async with WarmPool(size=1, **GUEST) as pool:
        await pool.wait_full()
        async with Sandbox.create(**GUEST, pool=pool, disk_limit_mib=32) as vm:
            await vm.exec("dd if=/dev/urandom of=/var/fill bs=1M count=80 conv=fsync", user="root")

            assert (run_base() / vm.id / "disk.qcow2").stat().st_size <= 32 * MIB


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 512 MiB for the directories of running sandboxes, beside this user's images and templates."""
    cache, run = tmp_path / "cache", tmp_path / "cache" / "run"
    cache.mkdir(mode=0o700)
    for entry in cache_dir().iterdir():
        (cache / entry.name).symlink_to(entry)
    run.unlink(missing_ok=True)
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512m,mode=700", "none", run]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("this user may not mount a small file system to fill")
    monkeypatch.setenv("TASKVM_CACHE", str(cache))
    yield run
    subprocess.run(["umount", "--lazy", run], check=True)


async def test_no_sandbox_starts_below_the_floor_of_free_space(small_run: Path) -> None:
    with pytest.raises(HostError, match="free_disk_mib=1000000000 must remain"):
        await Sandbox.create(**GUEST, free_disk_mib=10**9)

    assert list(small_run.iterdir()) == []


async def test_a_sandbox_ends_when_the_floor_of_free_space_is_crossed(small_run: Path) -> None:
    """Somebody fills the host's disk: the sandbox goes, and says why."""
    floor = 300
    async with Sandbox.create(**GUEST, free_disk_mib=floor) as vm:
        with (small_run / ".filler").open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, 400 * MIB)
        await until(lambda: vm.state == "lost")

        with pytest.raises(SandboxLostError, match=f"free_disk_mib={floor} must remain"):
            await vm.exec(["true"])


# Statistics.


async def test_statistics_are_those_of_the_host(vm: Sandbox) -> None:
    """CPU time grows with work, memory and disk with what is written, execs with those that run."""
    before = vm.statistics()
    async with await vm.spawn("sleep 600"):
        await vm.exec("dd if=/dev/urandom of=/var/some bs=1M count=20 conv=fsync", user="root")
        during = vm.statistics()
    after = vm.statistics()

    assert (before.running_execs, during.running_execs, after.running_execs) == (0, 1, 0)
    assert during.cpu_s > before.cpu_s
    assert 20 * MIB <= during.disk_bytes - before.disk_bytes <= 40 * MIB
    assert 0 < during.proportional_bytes <= during.resident_bytes < 400 * MIB
    assert before.uptime_s < during.uptime_s < after.uptime_s
    assert during.open_connections == 0


async def test_what_is_written_after_a_fork_is_counted_too() -> None:
    """It goes to a new layer of the disk; each sandbox counts its own."""
    write = "dd if=/dev/urandom of=/var/$(mktemp -u XXXX) bs=1M count=20 conv=fsync"
    async with Sandbox.create(**GUEST) as vm:
        await vm.exec(write, user="root", check=True)
        before = vm.statistics().disk_bytes
        async with vm.fork() as child:
            await vm.exec(write, user="root", check=True)
            told = [each.statistics().disk_bytes for each in (vm, child)]

    assert 20 * MIB <= told[0] - before <= 40 * MIB
    assert told[1] <= 20 * MIB


# Descriptors.


def test_more_sandboxes_start_than_the_usual_limit_of_open_files_allows() -> None:
    """The process raises it by itself; it has `taskvm.room` for them."""
    program = """
import asyncio, resource
from taskvm import Sandbox
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 2000))
async def main():
    vms = await asyncio.gather(*(Sandbox.create(cpus=1, memory_mib=256) for n in range(6)))
    answers = await asyncio.gather(*(vm.exec(["echo", "here"]) for vm in vms))
    print(*(answer.stdout.strip() for answer in answers))
    await asyncio.gather(*(vm.close() for vm in vms))
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S
    )

    assert done.stdout.split() == ["here"] * 6, done.stderr
