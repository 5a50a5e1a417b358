"""What one sandbox may take of its host's time and disk, as checked values; `watch.py` holds a running one to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from taskvm.errors import UsageError
from taskvm.paths import cache_dir
from taskvm.vm.cpushare import LEAST_CPUS
from taskvm.vm.machine import DISK_LIMIT_BYTES

# Shorter pauses between two commands of an agent are its model's thinking time: stopping costs nothing, but waking adds
# some ten milliseconds to the next command.
IDLE_PAUSE_S = 30.0
# Enough for the host itself to go on, and for what sandboxes write between two looks at the disk (watch.TICK_S).
FREE_DISK_MIB = 1024
# 2 TiB; growing costs the guest some 7 s of processor time for each TiB.
MOST_DISK_SIZE_MIB = 2 * 1024 * 1024
# A qcow2 layer has 8 bytes of table, and 2 of counts, for each 64 KiB: less than this part of its disk.
_TABLES_SHARE = 1024
# An overlay's own tables before the guest has written anything take 256 KiB.
LEAST_DISK_LIMIT_MIB = 1


def spare_bytes(directory: Path) -> int:
    """Return what must stay free on the disk of `directory`: below it sandboxes are ended, if theirs is the same."""
    same = directory.stat().st_dev == cache_dir().stat().st_dev
    return FREE_DISK_MIB << 20 if same else 0


class LimitArguments(TypedDict, total=False):
    """`Limits` as keyword arguments of `Sandbox.create`."""

    max_duration_s: float | None
    idle_timeout_s: float | None
    idle_pause_s: float
    disk_size_mib: int | None
    disk_limit_mib: int | None
    free_disk_mib: int
    cpu_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one sandbox.

    max_duration_s: seconds from its start until the host ends it, whatever it does. None: no limit.
    idle_timeout_s: seconds without activity until the host ends it. Activity is a running exec, a file operation, a
        connection or a DNS query of the guest, and traffic on a mount. None: no limit.
    idle_pause_s: seconds without activity until its virtual CPUs are stopped; the next request lets them run again.
        A guest with a process that still runs in the background is never paused. 0: never.
    disk_size_mib: how large its disk is, in MiB: at least its image's (4096). None: that. The guest's file system has
        grown into it before anything of yours runs.
    disk_limit_mib: how large its disk's file on the host may grow, in MiB; beyond it the guest gets I/O errors. None:
        16384, or what a full disk of `disk_size_mib` takes when that is more.
    free_disk_mib: free space that must remain on the host's disk, in MiB: below it no sandbox starts, and a running
        one is ended.
    cpu_share: the processor time of the host that it gets at most, as a number of processors: 0.5 is half of one. None:
        no limit but `cpus`. Needs a control group that this user may make (HostError where there is none).
    """

    max_duration_s: float | None = None
    idle_timeout_s: float | None = None
    idle_pause_s: float = IDLE_PAUSE_S
    disk_size_mib: int | None = None
    disk_limit_mib: int | None = None
    free_disk_mib: int = FREE_DISK_MIB
    cpu_share: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_duration_s", "idle_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"limit {name} to {value}", "it must be more than 0 seconds")
        for name, least in (
            ("idle_pause_s", 0),
            ("disk_size_mib", 1),
            ("disk_limit_mib", LEAST_DISK_LIMIT_MIB),
            ("free_disk_mib", 0),
            ("cpu_share", LEAST_CPUS),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:  # NaN too
                raise UsageError(f"set {name} to {value}", f"it must be at least {least}")
        if (self.disk_size_mib or 0) > MOST_DISK_SIZE_MIB:
            raise UsageError(
                f"set disk_size_mib to {self.disk_size_mib}", f"it is at most {MOST_DISK_SIZE_MIB}"
            )

    @property
    def disk_size_bytes(self) -> int | None:
        return None if self.disk_size_mib is None else self.disk_size_mib << 20

    @property
    def disk_limit_bytes(self) -> int:
        if self.disk_limit_mib is not None:
            return self.disk_limit_mib << 20
        size = self.disk_size_bytes or 0
        return max(DISK_LIMIT_BYTES, size + size // _TABLES_SHARE)
