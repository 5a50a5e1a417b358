"""A bound on the host's processor time that one QEMU gets: a control group of its own, where this user may make one.

Which that is differs: root has all of them, a user's session the part that systemd delegated to it (Delegate= of
systemd.resource-control(5)), a container often none. What cannot be bound is an error, not a sandbox without a bound.

Both hierarchies of Linux are known: cgroup v2 (cpu.max) and the older v1 (cpu.cfs_quota_us).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from taskvm.errors import HostError

PREFIX = "taskvm-"
_MOUNT = Path("/sys/fs/cgroup")
# In each of which a share is given: the kernel's default. It takes no quota below 1 ms.
_PERIOD_US = 100_000
LEAST_CPUS = 0.01


@dataclass(frozen=True, slots=True)
class Place:
    """A control group below which others may be made; `unified` is cgroup v2."""

    path: Path
    unified: bool


class CpuShare:
    """The control group of one sandbox. `release` it when its processes have ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def take(
        cls, name: str, cpus: float, processes: list[int], *, runs: Callable[[str], bool]
    ) -> CpuShare:
        """Bind `processes` together to so many processors. What sandboxes left that no longer run (`runs`) is removed.

        Raises HostError with the reason of each place that was tried.
        """
        refusals = []
        for place in places(Path("/proc/self/cgroup").read_text(), _MOUNT):
            _sweep(place.path, runs)
            group = place.path / f"{PREFIX}{name}"
            try:
                _fill(group, place, cpus, processes)
            except OSError as error:
                refusals.append(f"{error.filename or group}: {error.strerror}")
                with contextlib.suppress(OSError):
                    group.rmdir()
            else:
                return cls(group)
        raise HostError(
            f"bound a sandbox to cpu_share={cpus:g}",
            "; ".join(refusals) or "this process is in no control group with a cpu controller",
            "Run it where control groups are delegated: systemd-run --user --scope -p Delegate=yes",
        )

    def release(self) -> None:
        """Remove the group; one that is gone, or that still has a process, is left to the next `take`."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def places(memberships: str, mount: Path) -> Iterator[Place]:
    """Yield where a group may be made, the best first. `memberships` is /proc/self/cgroup (cgroups(7))."""
    for line in memberships.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        below = path.lstrip("/")
        if hierarchy == "0":
            # Beside us first: a group with processes of its own gives no controller to groups below it (v2).
            root = mount if (mount / "cgroup.controllers").exists() else mount / "unified"
            own = root / below
            yield from (Place(each, unified=True) for each in ([own.parent] if below else []))
            yield Place(own, unified=True)
        elif "cpu" in controllers.split(","):
            yield Place(mount / controllers / below, unified=False)


def _fill(group: Path, place: Place, cpus: float, processes: list[int]) -> None:
    quota = int(cpus * _PERIOD_US)
    if place.unified and "cpu" not in (place.path / "cgroup.subtree_control").read_text().split():
        (place.path / "cgroup.subtree_control").write_text("+cpu")
    group.mkdir()
    if place.unified:
        (group / "cpu.max").write_text(f"{quota} {_PERIOD_US}")
    else:
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota))
    for process in processes:
        (group / "cgroup.procs").write_text(str(process))


def _sweep(place: Path, runs: Callable[[str], bool]) -> None:
    with contextlib.suppress(OSError):
        for left in place.glob(f"{PREFIX}*"):
            if not runs(left.name.removeprefix(PREFIX)):
                with contextlib.suppress(OSError):  # somebody's process is in it
                    left.rmdir()
