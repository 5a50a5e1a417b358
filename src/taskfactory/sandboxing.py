"""The sandbox of a task: the only module that knows taskvm, and it imports it only when one is wanted.

Rule 1: with the sandbox off, taskvm is never imported.
Rule 2: a sandbox that cannot start refuses the task. The host takes its place only where the user's
        own sandbox.json says `"onUnavailable": "host"`, only because a part of the sandbox is not
        installed, and never when the task chose what to start from.
Rule 3: nothing of the host's environment reaches the guest, and nothing that an agent can write
        decides about it.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from taskfactory.agents.operations import Ending, Entry, EntryKind, OutputSink
from taskfactory.agents.paths import PathMap
from taskfactory.agents.place import Place, Refusal, host_place, host_roots
from taskfactory.errors import EnvironmentLost, EnvironmentUnavailable, OperationError
from taskfactory.sandboxconfig import SandboxConfig
from taskfactory.taskfile import replace_file
from taskfactory.workspace import refuse_inside

if TYPE_CHECKING:
    from taskvm import HostDir, Opening, Process, Provider, Sandbox, Secret, SecretArguments

GUEST_ROOT = "/workspace"
# Of what `privateFiles` keeps: several times what the dependencies of a large project take.
PRIVATE_LIMIT = 1 << 30
# Of the guest's own program that says where its home is.
_HOME_TIMEOUT_S = 30.0
MAX_REFUSALS = 100

Say = Callable[[str], None]


@asynccontextmanager
async def open_place(
    config: SandboxConfig,
    workspace: Path,
    *,
    audit_path: Path,
    say: Say,
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[Place]:
    """Give the place where a task's tools act, and take it back.

    `environ` is where the secrets' values are read; it is this process's environment unless given.
    Raises EnvironmentUnavailable when the place cannot be had, EnvironmentLost when it cannot be released.
    """
    if not config.enabled:
        yield host_place(workspace)
        return
    from taskvm.errors import TaskvmError

    wish = _Wish(config, workspace, audit_path, say, environ or os.environ)
    try:
        async with AsyncExitStack() as stack:
            yield await _enter(wish, stack)
    except TaskvmError as error:
        raise EnvironmentLost(f"release the sandbox: {error}") from error


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a sandbox is to be."""

    config: SandboxConfig
    workspace: Path
    audit_path: Path
    say: Say
    environ: Mapping[str, str]


async def _enter(wish: _Wish, stack: AsyncExitStack) -> Place:
    from taskvm.errors import TaskvmError

    try:
        vm = await stack.enter_async_context(_sandbox(wish))
        if wish.config.workspace_mode == "review":
            # On every path, before the sandbox goes.
            stack.push_async_callback(_keep_changes, vm, wish)
        return await _sandbox_place(vm, wish)
    except TaskvmError as error:
        if not _host_takes_over(wish.config, error):
            raise EnvironmentUnavailable(_refusal(error)) from error
        wish.say(f"NO SANDBOX: {error}. The workspace's file allows the host: the task runs there")
        return host_place(wish.workspace)


def _host_takes_over(config: SandboxConfig, error: Exception) -> bool:
    """Whether the user's `"onUnavailable": "host"` means this failure: a part of the sandbox is not installed.

    Everything else refuses, since an agent may have brought it about: an earlier guest fills the disk or the memory,
    a task's file names an image that is not there, a QEMU that was started and failed found no memory. What was to
    be reviewed before it is done is not done without.
    """
    from taskvm.errors import NotInstalledError

    chosen = config.on_unavailable == "host" and config.workspace_mode != "review"
    return chosen and isinstance(error, NotInstalledError)


def _refusal(error: Exception) -> str:
    return f"the task needs a sandbox, and none can start: {error}. Nothing was run on the host"


def _sandbox(wish: _Wish) -> Opening[Sandbox]:
    import taskvm

    config = wish.config
    for path in config.extra_ca_files:
        refuse_inside(wish.workspace, Path(path), "CA file")
    if config.checkpoint_path is not None and "/" in config.checkpoint_path:
        refuse_inside(wish.workspace, Path(config.checkpoint_path), "checkpoint")
    workspace = taskvm.HostDir(wish.workspace.resolve(), mode=config.workspace_mode)
    return taskvm.Sandbox.create(
        mounts={GUEST_ROOT: _shadowed(config, workspace)},
        allow=config.allowed_hosts,
        allow_addresses=config.allowed_addresses,
        resolve=config.resolve,
        secrets=_secrets(config, wish.environ),
        image=None if config.checkpoint_path else config.image_path,  # it has its own
        checkpoint=config.checkpoint_path,
        extra_ca_files=config.extra_ca_files,
        passthrough=config.passthrough,
        audit_path=wish.audit_path,
        on_progress=wish.say,
    )


async def _keep_changes(vm: Sandbox, wish: _Wish) -> None:
    """Write what the task changed as a patch beside the record: nobody is there to be asked."""
    from taskvm.errors import TaskvmError

    try:
        with await vm.changes(GUEST_ROOT) as changes:
            count = len(changes)
            text = await asyncio.to_thread(changes.diff, binary=True) if count else ""
    except TaskvmError as error:
        raise EnvironmentLost(f"keep the task's changes: {error}. They are lost") from error
    if count:
        data = text.encode("utf-8", "surrogateescape")
        patch = await asyncio.to_thread(keep_patch, data, wish.audit_path.parent)
        wish.say(f"{count} changes wait for review: read {patch}, then `git apply` it")


def keep_patch(data: bytes, record: Path) -> Path:
    """Write a patch beside a run's record, or below /tmp when that is not possible, and return where it is.

    The sandbox that the changes lie in is about to go. Raises EnvironmentLost.
    """
    failures = []
    for elsewhere in (False, True):
        try:
            directory = tempfile.mkdtemp(prefix="taskfactory-changes-") if elsewhere else record
            patch = Path(directory) / "changes.patch"
            replace_file(patch, data, mode=0o600)
        except OSError as error:
            failures.append(f"{error.filename or record}: {error.strerror or error}")
        else:
            return patch
    raise EnvironmentLost(
        f"keep the task's changes: they cannot be written ({'; '.join(failures)}), and are lost."
        " Free disk space and run the task again"
    )


def _shadowed(config: SandboxConfig, workspace: HostDir) -> Provider:
    """Return what serves the workspace without what its user hides. Raises UsageError for what is no pattern."""
    from taskvm import Memory, Shadow

    served: Provider = workspace
    if config.hidden_files:
        served = Shadow(served, config.hidden_files)
    if config.private_files:
        private = Memory(limit_bytes=PRIVATE_LIMIT)
        served = Shadow(served, config.private_files, private=private)
    return served


def _secrets(config: SandboxConfig, environ: Mapping[str, str]) -> list[Secret]:
    """Read the secrets' values. Raises EnvironmentUnavailable that names every missing variable."""
    from taskvm import Secret

    missing = [
        secret.env_var for secret in config.secrets.values() if not environ.get(secret.env_var)
    ]
    if missing:
        names = ", ".join(sorted(missing))
        raise EnvironmentUnavailable(
            f"read the task's secrets: not set in this program's environment: {names}."
            " Set them and run the task again"
        )
    secrets = []
    for name, secret in config.secrets.items():
        more: SecretArguments = {"places": secret.places, "shape": secret.shape}
        if secret.headers:
            more["headers"] = secret.headers
        secrets.append(Secret.from_value(name, environ[secret.env_var], hosts=secret.hosts, **more))
    return secrets


async def _sandbox_place(vm: Sandbox, wish: _Wish) -> Place:
    result = await vm.exec('printf %s "$HOME"', timeout_s=_HOME_TIMEOUT_S)
    home = result.stdout if result.stdout.startswith("/") else "/root"
    return Place(
        operations=SandboxOperations(vm),
        paths=PathMap(host_roots=host_roots(wish.workspace), root=GUEST_ROOT, home=home),
        sandboxed=True,
        description=f"in the sandbox {vm.id}",
        refusals=lambda: read_refusals(wish.audit_path),
    )


class SandboxOperations:
    """Files and commands of a sandbox's guest."""

    def __init__(self, vm: Sandbox) -> None:
        self._vm = vm

    async def read_bytes(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        with _mapped(f"read {path}"):
            return await self._vm.files.read_bytes(path, offset=offset, length=length)

    async def write_bytes(self, path: str, data: bytes) -> None:
        with _mapped(f"write {path}"):
            await self._vm.files.write_bytes(await self._target(path), data)

    async def stat(self, path: str) -> Entry:
        with _mapped(f"stat {path}"):
            info = await self._vm.files.stat(path)
        return Entry(name=PurePosixPath(path).name, kind=_kind(info.type), size=info.size)

    async def list(self, path: str) -> Sequence[Entry]:
        with _mapped(f"list {path}"):
            entries = await self._vm.files.list(path)
        return [Entry(name=info.name, kind=_kind(info.type), size=info.size) for info in entries]

    async def mkdir(self, path: str) -> None:
        with _mapped(f"make the directory {path}"):
            await self._vm.files.mkdir(path, parents=True)

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        cwd: str,
        on_output: OutputSink,
        timeout_s: float | None = None,
    ) -> Ending:
        argv = command if isinstance(command, str) else list(command)
        with _mapped("run a command" if isinstance(argv, str) else f"run {argv[0]}"):
            process = await self._vm.spawn(argv, cwd=cwd, merge_output=True)
            try:
                return await _follow(process, on_output, timeout_s)
            except BaseException:
                process.abandon()  # without waiting: this may be a cancellation
                raise

    async def _target(self, path: str) -> str:
        """Return where a write must go: a link stays a link."""
        from taskvm.errors import GuestError

        try:
            if (await self._vm.files.stat(path, follow=False)).type != "symlink":
                return path
        except GuestError:
            return path  # it does not exist: the write says what else is wrong
        found = await self._vm.exec(["readlink", "-m", "--", path])
        return os.fsdecode(found.stdout_bytes.removesuffix(b"\n"))


async def _follow(process: Process, on_output: OutputSink, timeout_s: float | None) -> Ending:
    try:
        async with asyncio.timeout(timeout_s):
            await process.close_stdin()
            async for data in process.stdout:
                if not on_output(data):
                    await process.kill_all()
                    return Ending(exit_code=137, stopped=True)
            result = await process.wait()
    except TimeoutError:
        await process.kill_all()
        return Ending(exit_code=137, timed_out=True)
    return Ending(exit_code=result.exit_code)


@contextmanager
def _mapped(operation: str) -> Iterator[None]:
    """Turn taskvm's errors into ours: a refusal of the guest, or the loss of the sandbox."""
    from taskvm.errors import GuestError, SandboxError, TaskvmError

    try:
        yield
    except GuestError as error:
        raise OperationError(operation, error.cause, error.errno) from error
    except SandboxError as error:
        raise EnvironmentLost(f"{operation}: the sandbox is lost: {error}") from error
    except TaskvmError as error:
        raise OperationError(operation, error.cause) from error


def _kind(kind: str) -> EntryKind:
    match kind:
        case "file" | "dir" | "symlink":
            return kind
        case _:
            return "other"


# What was refused...


class _AuditLine(msgspec.Struct, frozen=True):
    """The part of an audit event that a summary shows; its other fields are skipped."""

    decision: str = ""
    host: str = ""
    address: str = ""
    port: int = 0
    reason: str = ""


def read_refusals(audit_path: Path) -> Sequence[Refusal]:
    """Return the distinct refusals of a sandbox's audit log, the first MAX_REFUSALS of them."""
    found: dict[Refusal, None] = {}
    if not audit_path.exists():
        return ()
    with audit_path.open("rb") as file:
        for line in file:
            event = _parse(line)
            if event is not None and event.decision == "deny" and len(found) < MAX_REFUSALS:
                port = f":{event.port}" if event.port else ""
                found[Refusal(f"{event.host or event.address or '?'}{port}", event.reason)] = None
    return tuple(found)


def _parse(line: bytes) -> _AuditLine | None:
    try:
        return msgspec.json.decode(line, type=_AuditLine)
    except msgspec.MsgspecError:
        return None  # a line cut by a crash
