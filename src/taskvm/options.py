"""The options of a sandbox, checked: a value that exists can be started."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Unpack, get_args

from taskvm.arguments import check_kind, check_variables, refuse_unknown
from taskvm.checkpoints.checkpointfile import Saved
from taskvm.egress.nametable import parse_table
from taskvm.egress.oversight import Oversight
from taskvm.egress.passthrough import NOTHING, Passthrough
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.errors import UsageError
from taskvm.fs.hostdir import HostDir
from taskvm.fs.hostfile import HostFile
from taskvm.fs.provider import Provider
from taskvm.fs.router import Router
from taskvm.fs.wrapper import Wrapper
from taskvm.limits import LimitArguments, Limits
from taskvm.paths import cache_path, state_path
from taskvm.progress import tell_terminal
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


class ResumeArguments(LimitArguments, total=False):
    """Arguments of `Sandbox.create` that a sandbox from a checkpoint, or a fork, is given anew."""

    mounts: Mapping[str, Provider] | None
    allow: Sequence[str]
    allow_addresses: Sequence[str]
    policy: Policy | None
    oversight: Oversight | None
    secrets: Sequence[Secret]
    env: Mapping[str, str] | None
    resolve: Mapping[str, str] | None
    extra_ca_files: Sequence[str | os.PathLike[str]]
    passthrough: Sequence[str]
    audit_path: str | os.PathLike[str] | None
    on_progress: Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxOptions:
    """What `Sandbox.create` was asked for. `image` is a name or digest of the image store; None is the default
    image.
    """

    mounts: Mapping[str, Provider] = field(default_factory=dict)
    policy: Policy
    oversight: Oversight = field(default_factory=Oversight)
    secrets: Sequence[Secret] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    resolve: Mapping[str, str] = field(default_factory=dict)
    extra_ca_files: Sequence[Path] = ()
    passthrough: Passthrough = NOTHING
    audit_path: Path | None = None
    image: str | None = None
    checkpoint: Saved | None = None
    cpus: int = DEFAULT_CPUS
    memory_mib: int = DEFAULT_MEMORY_MIB
    accel: AcceleratorChoice = "auto"
    warm: bool = True
    limits: Limits = field(default_factory=Limits)
    pool: WarmPool | None = None
    on_progress: Callable[[str], None] = tell_terminal

    def __post_init__(self) -> None:
        if len(self.mounts) > MAX_MOUNTS:
            raise UsageError(
                "start a sandbox", f"{len(self.mounts)} mounts; at most {MAX_MOUNTS} are possible"
            )
        for path, provider in self.mounts.items():
            _check_mount_path(path)
            _check_provider(path, provider)
            _check_own_directories(path, provider)
            _check_audit_path(self.audit_path, provider)
            _check_checkpoint_path(self.checkpoint, provider)
        if self.accel not in get_args(AcceleratorChoice):
            raise UsageError(
                f"start a sandbox with accel={self.accel!r}", 'it must be "auto", "kvm" or "tcg"'
            )
        if self.checkpoint is not None:
            _check_checkpoint(self.checkpoint, self)
        check_variables(self.env)
        parse_table(self.resolve)
        for secret in self.secrets:
            if secret.name in self.env:
                raise UsageError(
                    f"start a sandbox with the secret {secret.name}",
                    "env has a variable of the same name",
                    "Drop it: the guest finds the secret's placeholder there",
                )


@dataclass(frozen=True, slots=True)
class Machinery:
    """What the machine of a sandbox is made of and started with."""

    image: str | None = None
    checkpoint: Saved | None = None
    cpus: int | None = None
    memory_mib: int | None = None
    accel: AcceleratorChoice = "auto"
    warm: bool = True
    pool: WarmPool | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Its processors, and its memory in MiB: what was said, else the checkpoint's.

        Raises UsageError for another one than a saved memory has.
        """
        saved = None if self.checkpoint is None else self.checkpoint.facts
        cpus, memory_mib = self.cpus, self.memory_mib
        if cpus is None:
            cpus = DEFAULT_CPUS if saved is None else saved.cpus
        if memory_mib is None:
            memory_mib = DEFAULT_MEMORY_MIB if saved is None else saved.memory_mib
        if self.checkpoint is not None and self.checkpoint.memory is not None:
            _check_shape(self.checkpoint, cpus, memory_mib)
        return cpus, memory_mib


def read_options(machinery: Machinery, **given: Unpack[ResumeArguments]) -> SandboxOptions:
    """Return the arguments of `Sandbox.create` as checked values. Raises UsageError."""
    known = {*ResumeArguments.__annotations__, *Machinery.__annotations__}
    refuse_unknown("start a sandbox", given, known)
    policy, audit_path = given.get("policy"), given.get("audit_path")
    cpus, memory_mib = machinery.shape
    policy, oversight = policy or Policy(), given.get("oversight") or Oversight()
    check_policy("start a sandbox", policy)
    check_kind("start a sandbox", "oversight", oversight, Oversight, "Write Oversight(approver)")
    policy = policy.joined(Policy.parse(given.get("allow", ()), given.get("allow_addresses", ())))
    secrets = tuple(given.get("secrets", ()))
    for secret in secrets:
        check_secret("start a sandbox", secret)
    ca_files = given.get("extra_ca_files", ())
    if isinstance(ca_files, str):
        raise UsageError("read extra_ca_files", "it is one text", f"Write a list: [{ca_files!r}]")
    return SandboxOptions(
        mounts=dict(given.get("mounts") or {}),
        policy=policy,
        oversight=oversight,
        secrets=secrets,
        env=dict(given.get("env") or {}),
        resolve=dict(given.get("resolve") or {}),
        extra_ca_files=tuple(Path(path) for path in ca_files),
        passthrough=Passthrough.parse(given.get("passthrough", ()), policy, secrets),
        audit_path=None if audit_path is None else Path(audit_path),
        image=machinery.image,
        checkpoint=machinery.checkpoint,
        cpus=cpus,
        memory_mib=memory_mib,
        accel=machinery.accel,
        warm=machinery.warm,
        pool=machinery.pool,
        limits=Limits(**_limits(given)),
        on_progress=given.get("on_progress", tell_terminal),
    )


def check_policy(operation: str, policy: object) -> None:
    """Raise UsageError for what is no policy."""
    advice = "Policy.from_file reads one, Policy.parse makes one of hosts"
    check_kind(operation, "policy", policy, Policy, advice)


def check_secret(operation: str, secret: object) -> None:
    """Raise UsageError for what is no secret. It may be the value of one, and is not repeated."""
    if not isinstance(secret, Secret):
        raise UsageError(
            f"{operation} with a secret of the type {type(secret).__name__}",
            "it is no Secret",
            "Write Secret.from_env(NAME, hosts=[HOST])",
        )


def change_options(options: SandboxOptions, **changes: Unpack[ResumeArguments]) -> SandboxOptions:
    """Return `options` with what `changes` names, each limit by itself; its audit log is a new one.

    Raises UsageError.
    """
    refuse_unknown("copy a sandbox", changes, ResumeArguments.__annotations__)
    passthrough = changes.pop("passthrough", None)
    fresh = read_options(Machinery(), **changes)
    fields = {_FIELD_OF.get(name, name) for name in changes if name not in LIMITS} | {"audit_path"}
    changed = replace(options, **{name: getattr(fresh, name) for name in fields})
    changed = replace(changed, limits=replace(options.limits, **_limits(changes)))
    if passthrough is None:
        return changed
    parsed = Passthrough.parse(passthrough, changed.policy, changed.secrets)
    return replace(changed, passthrough=parsed)


def changes_of_copies(
    count: int, changes: ResumeArguments, each: Callable[[int], ResumeArguments] | None
) -> list[ResumeArguments]:
    """Return what each of `count` copies is given: `changes`, and what `each` says of its number."""
    copies = [changes.copy() for _ in range(count)]
    if each is not None:
        for number, own in enumerate(copies):
            own.update(each(number))
    return copies


LIMITS = frozenset(LimitArguments.__annotations__)
_FIELD_OF = {"allow": "policy", "allow_addresses": "policy"}


def _limits(given: ResumeArguments) -> LimitArguments:
    return {name: value for name, value in given.items() if name in LIMITS}  # type: ignore[return-value]  # its keys


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


def _check_provider(path: str, provider: object) -> None:
    if not isinstance(provider, Provider):
        is_path = isinstance(provider, str | os.PathLike)
        raise UsageError(
            f"mount at {path}",
            f"{provider!r} is no provider",
            f"Write HostDir({str(provider)!r})" if is_path else "Write HostDir(path), or another",
        )


def _check_own_directories(path: str, provider: Provider) -> None:
    """What a guest can write to is not what others start from, nor the record of what it did."""
    for own in (cache_path(), state_path()):
        if is_writable_in(provider, own):
            raise UsageError(
                f"mount {provider!r} at {path}",
                f"the guest could change what taskvm itself keeps and believes, in {own}",
                "Mount a directory further down, or this one ro",
            )


def _check_audit_path(audit_path: Path | None, provider: Provider) -> None:
    """A guest that can write to its own record can take out what it did."""
    if audit_path is not None and is_writable_in(provider, audit_path):
        raise UsageError(
            f"write the audit log {audit_path}",
            "it is in a directory that the guest may write to",
            "Choose a path outside of every mount",
        )


def _check_checkpoint_path(saved: Saved | None, provider: Provider) -> None:
    """What a guest can write to is not what the next one starts from."""
    if saved is not None and is_writable_in(provider, saved.path):
        raise UsageError(
            f"start from the checkpoint {saved.path}",
            "it is in a directory that the guest may write to",
            "Keep it outside of every mount, or mount that read-only",
        )


def is_writable_in(provider: Provider, path: Path) -> bool:
    """Say whether what a guest writes, where `provider` is mounted, may come to the host's `path`, by a review too."""
    if isinstance(provider, Router):
        return any(is_writable_in(each, path) for each in provider.providers)
    if isinstance(provider, Wrapper) and not provider.readonly:
        return is_writable_in(provider.inner, path)
    if isinstance(provider, HostFile):
        return provider.mode != "ro" and path.resolve() == provider.path
    if not isinstance(provider, HostDir) or provider.mode == "ro":
        return False
    return path.resolve().is_relative_to(provider.path)


def _check_shape(saved: Saved, cpus: int, memory_mib: int) -> None:
    """Raise UsageError for another machine than the one that a memory was saved of."""
    facts = saved.facts
    if (cpus, memory_mib) != (facts.cpus, facts.memory_mib):
        raise UsageError(
            f"start from the checkpoint {saved.path} with {cpus} CPUs and {memory_mib} MiB",
            f"its memory is of a machine with {facts.cpus} and {facts.memory_mib}",
            f"Leave them out, or use its disk: {saved.disk}",
        )


def _check_checkpoint(saved: Saved, options: SandboxOptions) -> None:
    operation = f"start from the checkpoint {saved.path}"
    if options.image is not None:
        raise UsageError(operation, "it has its own image", "Leave image out")
    if saved.memory is not None and not options.warm:
        raise UsageError(
            operation, "warm=False boots, and its memory does not", f"Use its disk: {saved.disk}"
        )
