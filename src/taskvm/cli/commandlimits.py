"""What one command may use of the guest, as options of `run`, `shell` and `exec`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import click

import taskvm

P = ParamSpec("P")

NAMES = (
    "limit_memory",
    "limit_processes",
    "limit_cpus",
    "limit_disk_read",
    "limit_disk_write",
    "cpu_weight",
)

LIMIT_OPTIONS = (
    click.option(
        "--limit-memory",
        type=int,
        metavar="MIB",
        help="Memory that the command and what it starts may use, in MiB; beyond it the guest's kernel kills.",
    ),
    click.option(
        "--limit-processes",
        type=int,
        metavar="N",
        help="Processes and threads that it may have at a time.",
    ),
    click.option(
        "--limit-cpus",
        type=float,
        metavar="N",
        help="Virtual CPUs that it may use, such as 0.5.",
    ),
    click.option(
        "--limit-disk-read",
        type=float,
        metavar="MIB",
        help="MiB that it may read from the guest's disk in a second, such as 10.",
    ),
    click.option(
        "--limit-disk-write",
        type=float,
        metavar="MIB",
        help="MiB that it may write to the guest's disk in a second.",
    ),
    click.option(
        "--cpu-weight",
        type=int,
        metavar="N",
        help="Its share of them when commands compete, 1 to 10000. [default: 100]",
    ),
)


def read_limits(
    limit_memory: int | None,
    limit_processes: int | None,
    limit_cpus: float | None,
    limit_disk_read: float | None,
    limit_disk_write: float | None,
    cpu_weight: int | None,
) -> taskvm.ExecLimits | None:
    """Return what the options say, None for nothing. Raises UsageError."""
    limits = taskvm.ExecLimits(
        memory_mib=limit_memory,
        processes=limit_processes,
        cpus=limit_cpus,
        disk_read_mib_s=limit_disk_read,
        disk_write_mib_s=limit_disk_write,
        cpu_weight=cpu_weight,
    )
    return None if limits == taskvm.ExecLimits() else limits


def limit_options(
    command: Callable[Concatenate[taskvm.ExecLimits | None, P], None],
) -> Callable[..., None]:
    """Give `command` these options; it gets them as one value."""

    @functools.wraps(command)
    def collect(*args: P.args, **values: P.kwargs) -> None:
        said = {name: values.pop(name) for name in NAMES}
        command(read_limits(**said), *args, **values)  # type: ignore[arg-type]  # click has converted them

    for option in reversed(LIMIT_OPTIONS):
        collect = option(collect)
    return collect
