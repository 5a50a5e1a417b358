"""Limits and bill of one command, by the guest's kernel."""

import asyncio
import time

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm import ExecLimits, GuestError, Sandbox
from taskvm.wire.control import ExecBounds, ExecRequest, Started

pytestmark = pytest.mark.vm
BOTH_SURFACES = True

MIB = 1024 * 1024
# Takes 100 MiB and touches each page of them.
TAKE_MEMORY = (
    "import sys; block = bytearray(100 << 20); block[::4096] = b'x' * 25600; print('taken')"
)


async def test_a_command_is_told_what_it_cost(vm: Sandbox) -> None:
    """Time, memory, processes and bytes of its disk, those of its children included."""
    work = await vm.exec(
        "head -c 3000000 /dev/urandom > /var/tmp/data; sync /var/tmp/data; "
        "(python3 -c 'b = bytearray(40 << 20); b[::4096] = bytes(10240)'; touch /tmp/over) & "
        "(until test -e /tmp/over; do sleep 0.1; done) & wait"
    )
    rest = await vm.exec(["true"])

    assert work.ok, work.stderr
    assert work.usage is not None
    assert rest.usage is not None
    assert work.usage.cpu_s > rest.usage.cpu_s > 0
    assert work.usage.memory_peak_bytes > 40 * MIB > rest.usage.memory_peak_bytes
    assert work.usage.processes_peak >= 4
    assert rest.usage.processes_peak == 1
    assert work.usage.written_bytes >= 3_000_000 > rest.usage.written_bytes
    assert work.usage.oom_kills == 0


async def test_a_command_that_is_killed_at_its_time_limit_has_a_bill_too(vm: Sandbox) -> None:
    """Of all that it has used by then, of which it tells itself as long as it lives."""
    tell = "import time\nwhile True: print(time.process_time(), flush=True)"
    told: list[str] = []
    timeout_s = 1.0
    while not told:  # where the host is busy it is killed before it has begun
        result = await vm.exec(["python3", "-c", tell], timeout_s=timeout_s)
        told = result.stdout.splitlines()[:-1]  # the last is cut off anywhere
        timeout_s *= 2

    assert result.timed_out
    assert result.usage is not None
    assert result.usage.cpu_s >= float(told[-1]) > 0


async def test_memory_beyond_the_limit_is_refused_and_told(vm: Sandbox) -> None:
    """The same program runs with room; without, only it is killed."""
    beside = await vm.spawn("cat")
    fits = await vm.exec(["python3", "-c", TAKE_MEMORY], limits=ExecLimits(memory_mib=150))
    killed = await vm.exec(["python3", "-c", TAKE_MEMORY], limits=ExecLimits(memory_mib=50))
    await beside.write(b"alive")
    await beside.close_stdin()

    assert fits.stdout == "taken\n", fits.stderr
    assert killed.exit_code == 137
    assert "out of memory" in killed.outcome
    assert killed.usage is not None
    assert killed.usage.memory_peak_bytes <= 50 * MIB
    assert await beside.stdout.read() == b"alive"


async def test_processes_beyond_the_limit_are_not_made(vm: Sandbox) -> None:
    """A program that forks without end has as many children as it may; another exec forks on."""
    count = "import os\ntry:\n for n in range(50): os.fork() or os.pause()\nexcept OSError as e: print(n, e.errno)"
    program = count.replace("os.pause()", "__import__('signal').pause()")

    forked = await vm.exec(
        ["python3", "-c", program], limits=ExecLimits(processes=5), timeout_s=PATIENCE_S
    )

    assert forked.stdout == "4 11\n", forked.stderr  # EAGAIN
    assert forked.usage is not None
    assert forked.usage.processes_peak == 5
    assert (await vm.exec("echo $(echo forked)")).stdout == "forked\n"


async def test_processor_time_is_held_to_its_share(vm: Sandbox) -> None:
    """A tenth of a processor is what the program gets of the time that passes, whatever it wants.

    A guest that the host lets stand still takes that for time of the program that it was running: then once more.
    Without the limit it would be nearly all of the time, however often.
    """
    share = 1.0
    async with asyncio.timeout(PATIENCE_S):
        while share >= 0.3:
            begun = time.monotonic()
            result = await vm.exec(
                "exec 3>&1; timeout 2 bash -c 'while :; do :; done'",
                limits=ExecLimits(cpus=0.1, cpu_weight=1),
            )
            assert result.usage is not None
            share = result.usage.cpu_s / (time.monotonic() - begun)

    assert share > 0


async def test_the_disk_is_written_and_read_at_the_given_pace(vm: Sandbox) -> None:
    """Past the cache: three seconds' worth takes more than two, however fast the disk; so much at a time is free."""
    work = (
        "cd /var/tmp && dd if=/dev/zero of=pace bs=1M count=6 oflag=direct"
        " && dd if=pace of=/dev/null bs=1M iflag=direct"
    )
    limits = ExecLimits(disk_read_mib_s=3, disk_write_mib_s=2)

    begun = time.monotonic()
    paced = await vm.exec(work, limits=limits, timeout_s=PATIENCE_S)
    took_s = time.monotonic() - begun

    assert paced.ok, paced.stderr
    assert took_s > 2 + 1


async def test_limits_are_the_cgroups_own_before_the_program_runs(vm: Sandbox) -> None:
    group = "/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)"
    show = f"cd {group}; cat memory.max pids.max cpu.max cpu.weight; cut -d' ' -f2- io.max"
    limits = ExecLimits(
        memory_mib=64, processes=9, cpus=1.5, cpu_weight=7, disk_read_mib_s=1.5, disk_write_mib_s=2
    )

    bound = await vm.exec(show, limits=limits)
    free = await vm.exec(show)

    disk = [f"rbps={3 * MIB // 2}", f"wbps={2 * MIB}", "riops=max", "wiops=max"]
    assert bound.stdout.split() == [str(64 * MIB), "9", "150000", "100000", "7", *disk]
    assert free.stdout.split() == ["max", "max", "max", "100000", "100"]


async def test_a_limit_that_the_kernel_refuses_is_an_error_and_leaves_nothing(
    asynchronous_vm: Sandbox,
) -> None:
    """The exec fails with the file's name, and its cgroup is gone."""
    vm = asynchronous_vm
    bounds = ExecBounds(processes=2**62)
    request = ExecRequest(argv=[b"true"], env=[], cwd=b"/", limits=bounds)

    with pytest.raises(GuestError, match=r"pids\.max"):
        await vm._guest.control.request(request, Started, "run true")

    left = await vm.exec("ls -d /sys/fs/cgroup/exec/*/ | wc -l")
    assert left.stdout == "1\n"
