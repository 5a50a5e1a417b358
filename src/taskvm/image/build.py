"""Builds the assets of an image into a directory; where that directory is and what becomes of it is the store's."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from taskvm.errors import ImageError
from taskvm.image.debian import build_debian
from taskvm.image.kernel import unpack_kernel
from taskvm.image.manifest import ImageSpec, host_architecture
from taskvm.image.rootfs import build_rootfs
from taskvm.image.tools import require_tool

# A default build held at once 0.28 GB of tar, 0.3 GB of tree, 0.3 GB of disk, 0.13 GB of kernel, and 0.4 GB in /tmp.
_NEEDED_BYTES = 2 * 1024**3

_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "dpkg-deb": "dpkg",
    "dpkg-query": "dpkg",
    "apt-config": "apt",
    "tar": "tar",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
}


@dataclass(frozen=True, slots=True)
class BuiltAssets:
    """What a build learned about the files it made: vmlinuz, modules/ and rootfs.ext4."""

    kernel_release: str
    packages: dict[str, str]


def build_assets(spec: ImageSpec, target: Path, progress: Callable[[str], None]) -> BuiltAssets:
    """Build `spec` into the empty directory `target`. Raises ImageError before it starts when it cannot succeed."""
    _check_host(spec, target)
    started = time.monotonic()
    scratch = target / "scratch"
    scratch.mkdir()
    build_debian(spec, scratch, progress)
    progress("unpacking the kernel and its modules")
    release = unpack_kernel(scratch / "kernel.deb", scratch / "kernel", target)
    progress("making the root file system")
    packages = build_rootfs(scratch / "root.tar", scratch, target / "rootfs.ext4", spec.size_mib)
    shutil.rmtree(scratch)
    progress(
        f"built kernel {release} and {len(packages)} packages in {time.monotonic() - started:.0f} s"
    )
    return BuiltAssets(release, packages)


def runs_programs_of(debian_arch: str) -> bool:
    """Whether the kernel runs them, itself or by an emulator that is registered with it (binfmt_misc)."""
    tester = shutil.which("arch-test")
    if tester is None:
        return False
    return subprocess.run([tester, debian_arch], capture_output=True, check=False).returncode == 0


def _check_host(spec: ImageSpec, target: Path) -> None:
    operation = f"build a guest image of {spec.suite} for {spec.arch}"
    if spec.arch != host_architecture() and not runs_programs_of(spec.debian_arch):
        raise ImageError(
            operation,
            f"this host is {host_architecture()} and runs no programs of {spec.arch}, whose packages set themselves up",
            "Let it: apt-get install arch-test qemu-user-static binfmt-support",
        )
    for name, package in _TOOLS.items():
        require_tool(name, package)
    free = shutil.disk_usage(target).free
    if free < _NEEDED_BYTES:
        raise ImageError(
            operation,
            f"{target} has {free // 1024**2} MiB free, {_NEEDED_BYTES // 1024**2} MiB are needed",
            "Free some space, or set TASKVM_CACHE to a directory on another disk",
        )
