"""What one sandbox uses of the host, read from the kernel (proc(5)) when somebody asks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskvm.guest import Guest

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What a sandbox uses at one moment. What QEMU uses is 0 when it has ended.

    `cpu_s` is host processor time, `resident_bytes` QEMU's memory and `proportional_bytes` the same with each shared
    page divided among its users (templates share theirs; 0 where the kernel does not tell). `disk_bytes` is what its
    disk takes on the host. `paused` says that its virtual CPUs are stopped because nothing happens.
    """

    uptime_s: float
    cpu_s: float
    resident_bytes: int
    proportional_bytes: int
    disk_bytes: int
    running_execs: int
    open_connections: int
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Glance:
    """What can be asked often: a look costs 20 microseconds, where `measure` takes milliseconds for a large QEMU.

    `moved` grows with each call into the guest and each frame on its network and mounts.
    """

    cpu_s: float
    open_connections: int
    moved: int


def glance(guest: Guest) -> Glance:
    """Return what `guest` has used so far, and whether it is being used."""
    return Glance(
        cpu_s=_cpu_s(guest.machine.qemu_pid),
        open_connections=0 if guest.gateway is None else guest.gateway.connections,
        moved=0 if guest.watch is None else sum(guest.watch.movement),
    )


def measure(guest: Guest, uptime_s: float) -> Statistics:
    """Return what `guest` uses now. Reads four small files."""
    pid = guest.machine.qemu_pid
    memory = _memory(pid)
    return Statistics(
        uptime_s=uptime_s,
        cpu_s=_cpu_s(pid),
        resident_bytes=memory.get("Rss", 0),
        proportional_bytes=memory.get("Pss", 0),
        disk_bytes=sum(map(_disk_bytes, guest.layers.written)),
        running_execs=guest.control.running_execs,
        open_connections=0 if guest.gateway is None else guest.gateway.connections,
        paused=guest.watch is not None and guest.watch.paused,
    )


def _cpu_s(pid: int | None) -> float:
    # The second field is the program's name, which may hold spaces; 14 and 15 are utime and stime (proc_pid_stat(5)).
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else 0.0


def _memory(pid: int | None) -> dict[str, int]:
    lines = (line.split() for line in _read(f"/proc/{pid}/smaps_rollup").splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _disk_bytes(path: Path) -> int:
    try:
        return (
            path.stat().st_blocks * 512
        )  # stat(2): blocks of 512 bytes, whatever the file system's are
    except OSError:
        return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
