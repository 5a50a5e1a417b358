"""The two native binaries that ship with the package: the guest agent and the confining supervisor."""

from __future__ import annotations

from pathlib import Path

from taskvm.errors import NotInstalledError
from taskvm.vm.qemu import host_arch

_FOLDER = Path(__file__).parent.parent / "_native"


def guest_binary(arch: str) -> Path:
    """Return the guest agent for `arch`. Raises NotInstalledError when it was not built."""
    return _binary(f"taskvm-guest-{arch}")


def confine_binary() -> Path:
    """Return the supervisor for this host. Raises NotInstalledError when it was not built."""
    return _binary(f"taskvm-confine-{host_arch()}")


def _binary(name: str) -> Path:
    path = _FOLDER / name
    if not path.is_file():
        raise NotInstalledError(
            f"find {path}",
            "it is not part of this installation",
            "In a source checkout run scripts/build-native; wheels carry it",
        )
    return path
