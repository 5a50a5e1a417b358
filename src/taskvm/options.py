"""The options of a sandbox, checked: a value that exists can be started."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from taskvm.errors import UsageError
from taskvm.fs.hostdir import HostDir
from taskvm.fs.provider import Provider
from taskvm.limits import Limits
from taskvm.policy import Policy
from taskvm.secret import Secret
from taskvm.vm.warm import AcceleratorChoice

if TYPE_CHECKING:
    from taskvm.pool import WarmPool

DEFAULT_CPUS = 2
DEFAULT_MEMORY_MIB = 512
MAX_MOUNTS = 64
# Directories of the guest that a mount would break: they belong to its kernel and its agent.
_RESERVED = (
    "/",
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/etc",
    "/usr",
    "/bin",
    "/lib",
    "/lib64",
    "/sbin",
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def ignore_progress(line: str) -> None:
    """For progress that nobody wants to hear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxOptions:
    """What `Sandbox.create` was asked for. `image` is a name or digest of the image store; None is the default
    image.
    """

    mounts: Mapping[str, Provider] = field(default_factory=dict)
    policy: Policy
    secrets: Sequence[Secret] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    resolve: Mapping[str, str] = field(default_factory=dict)
    extra_ca_files: Sequence[Path] = ()
    audit_path: Path | None = None
    image: str | None = None
    cpus: int = DEFAULT_CPUS
    memory_mib: int = DEFAULT_MEMORY_MIB
    accel: AcceleratorChoice = "auto"
    warm: bool = True
    limits: Limits = field(default_factory=Limits)
    pool: WarmPool | None = None
    on_progress: Callable[[str], None] = ignore_progress

    def __post_init__(self) -> None:
        if len(self.mounts) > MAX_MOUNTS:
            raise UsageError(
                "start a sandbox", f"{len(self.mounts)} mounts; at most {MAX_MOUNTS} are possible"
            )
        for path, provider in self.mounts.items():
            _check_mount_path(path)
            _check_audit_path(self.audit_path, provider)
        for name, value in self.env.items():
            _check_variable(name, value)
        for secret in self.secrets:
            if secret.name in self.env:
                raise UsageError(
                    f"start a sandbox with the secret {secret.name}",
                    "env has a variable of the same name",
                    "Drop it: the guest finds the secret's placeholder there",
                )


def _check_mount_path(path: str) -> None:
    pure = PurePosixPath(path)
    if not pure.is_absolute() or ".." in pure.parts or str(pure) != path or "\0" in path:
        raise UsageError(
            f"mount at {path!r}", "it is not a plain absolute path", "Write it like /workspace"
        )
    if path in _RESERVED:
        raise UsageError(
            f"mount at {path!r}", "the guest's system lives there", "Use a path like /workspace"
        )


def _check_audit_path(audit_path: Path | None, provider: Provider) -> None:
    """A guest that can write to its own record can take out what it did."""
    if audit_path is None or provider.readonly or not isinstance(provider, HostDir):
        return
    if audit_path.resolve().is_relative_to(provider.path):
        raise UsageError(
            f"write the audit log {audit_path}",
            f"it is in {provider.path}, which the guest may write to",
            "Choose a path outside of every mount",
        )


def _check_variable(name: str, value: str) -> None:
    if not _VARIABLE.match(name):
        raise UsageError(
            f"set the variable {name!r}", "a name has letters, digits and _", "Rename it"
        )
    if "\0" in value:
        raise UsageError(f"set the variable {name}", "its value holds a NUL")
