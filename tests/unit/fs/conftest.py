"""Directories of the host, and mounts of them by this host's kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.kernel_mount import KernelMount

from taskvm.fs.hostdir import HostDir
from taskvm.fs.provider import Provider


@pytest.fixture
def kernel_mount(tmp_path: Path) -> Iterator[Callable[[Provider], KernelMount]]:
    """Mount providers; each reply that the kernel does not find well-formed fails the test."""
    mounts: list[KernelMount] = []

    def mount(provider: Provider) -> KernelMount:
        mounts.append(KernelMount(provider, tmp_path / f"mount{len(mounts)}"))
        return mounts[-1]

    yield mount
    for entry in mounts:
        entry.close()
        assert entry.refused == []
        assert entry.failures == []


@pytest.fixture
def mount_of(kernel_mount: Callable[[Provider], KernelMount]) -> Callable[[Provider], Path]:
    """Mount providers, and return where."""
    return lambda provider: kernel_mount(provider).path


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A directory of the host."""
    path = tmp_path / "host"
    path.mkdir()
    return path


@pytest.fixture
def guest(mount_of: Callable[[Provider], Path], host: Path) -> Path:
    """Where `host` is mounted."""
    return mount_of(HostDir(host))
