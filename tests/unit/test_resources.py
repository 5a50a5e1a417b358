"""taskvm.resources: limits are checked before anything starts, and a bill says what it counts."""

import pytest

from taskvm import ExecLimits, ExecResult, ExecUsage, UsageError
from taskvm.resources import bounds_of, usage_of
from taskvm.wire.control import ExecBounds, UsageReport

REPORT = UsageReport(
    user_us=1_500_000,
    system_us=500_000,
    memory_peak=4096,
    processes_peak=3,
    read_bytes=10,
    written_bytes=20,
    oom_kills=0,
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_mib": 0},
        {"processes": 0},
        {"cpus": 0},
        {"cpus": float("nan")},
        {"cpu_weight": 0},
        {"cpu_weight": 10_001},
        {"disk_read_mib_s": 0},
        {"disk_write_mib_s": float("nan")},
    ],
)
def test_a_limit_that_the_kernel_does_not_know_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        ExecLimits(**wrong)  # type: ignore[arg-type]  # that is the test


def test_limits_become_the_numbers_of_the_cgroup() -> None:
    limits = ExecLimits(
        memory_mib=2, processes=5, cpus=0.5, cpu_weight=50, disk_read_mib_s=1.5, disk_write_mib_s=1
    )

    assert bounds_of(limits) == ExecBounds(
        memory=2 << 20, processes=5, cpu_us=50_000, cpu_weight=50, disk_read=3 << 19, disk_write=1 << 20,
    )  # fmt: skip
    assert bounds_of(ExecLimits()) == ExecBounds()


def test_a_bill_is_in_seconds_and_bytes() -> None:
    usage = usage_of(REPORT)

    assert (usage.user_s, usage.system_s, usage.cpu_s) == (1.5, 0.5, 2.0)
    assert (usage.memory_peak_bytes, usage.processes_peak) == (4096, 3)
    assert (usage.read_bytes, usage.written_bytes, usage.oom_kills) == (10, 20, 0)


def test_a_result_says_that_memory_ran_out() -> None:
    """The exit status alone is a riddle: the shell's 137, or 1 of a build whose compiler was killed."""
    killed = ExecUsage(
        user_s=0, system_s=0, memory_peak_bytes=1, processes_peak=1,
        read_bytes=0, written_bytes=0, oom_kills=2,
    )  # fmt: skip

    outcome = ExecResult(exit_code=1, usage=killed).outcome

    assert outcome == "exit code 1; out of memory, the kernel killed 2 of its processes"
