"""What one command may use of the guest, and what it has used: limits and bill of its cgroup.

Both are kept by the guest's kernel, and a guest's root can leave its cgroup or lie about it: they hold programs that
do not attack. What binds every guest are `cpus`, `memory_mib` and `Limits`, which the host holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from taskvm.errors import UsageError
from taskvm.wire.control import ExecBounds, UsageReport

# cpu.max gives microseconds of each period; the kernel takes no less than 1 ms of them.
_CPU_PERIOD_US = 100_000
# What the kernel takes, or more than any machine has (cgroup-v2.rst).
_RANGES = {
    "memory_mib": (1, 2**30),
    "processes": (1, 2**22),  # PID_MAX_LIMIT of a 64-bit kernel
    "cpus": (0.01, 1024),
    "cpu_weight": (1, 10_000),
    "disk_read_mib_s": (0.01, 2**20),
    "disk_write_mib_s": (0.01, 2**20),
}
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecLimits:
    """What one command and everything that it starts may use together. None is no limit of its own.

    memory_mib: memory, the files that it reads and writes included; beyond it the kernel frees, then kills.
    processes: processes and threads at a time; beyond it fork fails (EAGAIN).
    cpus: processor time as a number of processors: 0.5 is half of one.
    cpu_weight: its share when commands compete, 1 … 10000; every command has 100.
    disk_read_mib_s, disk_write_mib_s: MiB a second from and to the guest's disk, mounts not counted; a program waits
        there for what is beyond. What the cache has is not read, and what it writes behind a program counts then.
    """

    memory_mib: int | None = None
    processes: int | None = None
    cpus: float | None = None
    cpu_weight: int | None = None
    disk_read_mib_s: float | None = None
    disk_write_mib_s: float | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:  # NaN too
                raise UsageError(f"limit {name} of a command to {value}", f"it is {least} … {most}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecUsage:
    """What a command and everything that it started had used when its main process ended, as the guest says.

    `cpu_s` is processor time, `user_s` and `system_s` its two parts. `memory_peak_bytes` includes the cache of its
    files. `read_bytes` and `written_bytes` went from and to the guest's disk, mounts not counted: what waits in the
    cache is not written yet. `oom_kills` are processes that the kernel killed for want of memory.
    """

    user_s: float
    system_s: float
    memory_peak_bytes: int
    processes_peak: int
    read_bytes: int
    written_bytes: int
    oom_kills: int

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


def bounds_of(limits: ExecLimits) -> ExecBounds:
    """Return the limits as the guest's agent takes them."""
    return ExecBounds(
        memory=_bytes(limits.memory_mib),
        processes=limits.processes,
        cpu_weight=limits.cpu_weight,
        cpu_us=None if limits.cpus is None else int(limits.cpus * _CPU_PERIOD_US),
        disk_read=_bytes(limits.disk_read_mib_s),
        disk_write=_bytes(limits.disk_write_mib_s),
    )


def usage_of(report: UsageReport) -> ExecUsage:
    """Return what the agent said, in the units of ExecUsage."""
    return ExecUsage(
        user_s=report.user_us / 1e6,
        system_s=report.system_us / 1e6,
        memory_peak_bytes=report.memory_peak,
        processes_peak=report.processes_peak,
        read_bytes=report.read_bytes,
        written_bytes=report.written_bytes,
        oom_kills=report.oom_kills,
    )


def _bytes(mib: float | None) -> int | None:
    return None if mib is None else int(mib * _MIB)
