"""The sandbox for programs that block: the surface of `taskvm.Sandbox` without `await`.

Every method is thin: it hands its arguments to its asynchronous twin on the loop of `taskvm.sync.bridge`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from taskvm import process as aio_process
from taskvm import sandbox as aio
from taskvm.arguments import check_stdin
from taskvm.commands import Command
from taskvm.egress.oversight import Oversight
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.errors import TaskvmError
from taskvm.files import GuestPath
from taskvm.fs.provider import Provider
from taskvm.limits import LimitArguments
from taskvm.net import ingress as aio_ingress
from taskvm.net.ingress import LOCALHOST
from taskvm.options import ResumeArguments, changes_of_copies
from taskvm.process import ExecResult
from taskvm.progress import tell_terminal
from taskvm.resources import ExecLimits
from taskvm.review.changes import ChangeSet
from taskvm.review.survey import CHANGE_LIMITS
from taskvm.sandbox import State
from taskvm.sync.bridge import Bridge, Call
from taskvm.sync.checkpoint import Checkpoint
from taskvm.sync.files import Files
from taskvm.sync.forward import Forward
from taskvm.sync.pool import WarmPool
from taskvm.sync.process import Process
from taskvm.treecopy import CopyLimits
from taskvm.usage import Statistics
from taskvm.vm.warm import AcceleratorChoice


class Sandbox:
    """A running sandbox. Make one with `create`; it is closed by leaving `with`, by `close`, or at the program's exit.

    `files` are the guest's files. `id` names the sandbox in the audit log and is the guest's host name. Threads may
    share it. A call blocks its thread, also one that runs an event loop (a notebook's); Ctrl-C cancels the call.
    """

    def __init__(self, bridge: Bridge, sandbox: aio.Sandbox) -> None:
        self._bridge = bridge
        self._sandbox = sandbox
        self.id: str = sandbox.id
        self.files: Files = Files(bridge, sandbox.files)

    @classmethod
    def create(
        cls,
        *,
        mounts: Mapping[str, Provider] | None = None,
        allow: Sequence[str] = (),
        allow_addresses: Sequence[str] = (),
        policy: Policy | None = None,
        oversight: Oversight | None = None,
        secrets: Sequence[Secret] = (),
        env: Mapping[str, str] | None = None,
        resolve: Mapping[str, str] | None = None,
        extra_ca_files: Sequence[str | os.PathLike[str]] = (),
        passthrough: Sequence[str] = (),
        audit_path: str | os.PathLike[str] | None = None,
        image: str | None = None,
        checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
        cpus: int | None = None,
        memory_mib: int | None = None,
        accel: AcceleratorChoice = "auto",
        warm: bool = True,
        pool: WarmPool | None = None,
        on_progress: Callable[[str], None] = tell_terminal,
        **limits: Unpack[LimitArguments],
    ) -> Sandbox:
        """Start a sandbox and return it running. The arguments are those of `taskvm.Sandbox.create`.

        on_progress is called in the thread that called `create`; an exception of it ends the start and is raised.

        Raises UsageError for wrong arguments; UnavailableError, ImageError or HostError when this host cannot
        start a sandbox; SandboxLostError when the guest does not come up. Nothing is left behind then.
        """
        bridge = Bridge.current()
        call = Call(bridge, undo=partial(_close, bridge))
        starting = aio.Sandbox.create(
            mounts=mounts, allow=allow, allow_addresses=allow_addresses, policy=policy, oversight=oversight,
            secrets=secrets, env=env, resolve=resolve, extra_ca_files=extra_ca_files, passthrough=passthrough,
            audit_path=audit_path, image=image, cpus=cpus, memory_mib=memory_mib, accel=accel, warm=warm,
            checkpoint=checkpoint._checkpoint if isinstance(checkpoint, Checkpoint) else checkpoint,
            pool=None if pool is None else pool._pool,
            on_progress=call.callback(on_progress), **limits,
        )  # fmt: skip

        async def start() -> aio.Sandbox:
            sandbox = await starting
            bridge.own(sandbox, sandbox.close)
            return sandbox

        return cls(bridge, call.run(start))

    # What it is.

    def __repr__(self) -> str:
        return repr(self._sandbox)

    @property
    def state(self) -> State:
        """`running`, `lost` (the guest is gone) or `closed`."""
        return self._sandbox.state

    @property
    def placeholders(self) -> Mapping[str, str]:
        """What the guest sees instead of each secret, by the secret's name."""
        return self._sandbox.placeholders

    def put_secret(self, secret: Secret) -> str:
        """Add a secret, or replace the one of this name, and return its placeholder, which stays the same.

        Commands that start from now on find it in the variable of its name. A value that was replaced is still
        looked for in what leaves; connections to a host that it is no longer for are cut. Raises UsageError when
        one of its hosts is not allowed, or `env` has the name.
        """

        async def put() -> str:
            return self._sandbox.put_secret(secret)

        return self._bridge.call(put)

    def revoke_secret(self, name: str) -> None:
        """Let a secret go nowhere from now on; requests with its placeholder are refused.

        Connections to its hosts are cut: a request may be on its way with the value.
        Raises UsageError for a secret that the sandbox does not have.
        """

        async def revoke() -> None:
            self._sandbox.revoke_secret(name)

        self._bridge.call(revoke)

    @property
    def policy(self) -> Policy:
        """What it may reach now."""
        return self._sandbox.policy

    def change_policy(self, policy: Policy) -> None:
        """Judge by `policy` from now on, such as `vm.policy.allowing("example.com")`.

        Connections to hosts whose rules are not the same, or the same with more after them, are cut at
        once. Raises SandboxStateError, SandboxLostError when it does not run.
        """

        async def change() -> None:
            self._sandbox.change_policy(policy)

        self._bridge.call(change)

    @property
    def audit_path(self) -> Path:
        """The file of egress decisions, one JSON object in a line."""
        return self._sandbox.audit_path

    @property
    def accelerator(self) -> str:
        """What runs the guest: "kvm" or "tcg"."""
        return self._sandbox.accelerator

    @property
    def host_pid(self) -> int:
        """The host's process that supervises QEMU."""
        return self._sandbox.host_pid

    def statistics(self) -> Statistics:
        """Return what it uses of the host now. Raises SandboxStateError, SandboxLostError when it does not run."""

        async def measure() -> Statistics:
            return self._sandbox.statistics()

        return self._bridge.call(measure)

    # What it does.

    def exec(
        self,
        command: Command,
        *,
        cwd: GuestPath | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | bytes | Iterable[bytes] | None = None,
        timeout_s: float | None = None,
        check: bool = False,
        user: str | None = None,
        limits: ExecLimits | None = None,
    ) -> ExecResult:
        """Run a command to its end and return what it wrote and how it ended.

        A list is executed as it is; a str runs in the guest's bash. `cwd` defaults to /workspace when that is
        mounted, else the user's home. `timeout_s`, or Ctrl-C, kills everything that the command started. A `stdin` of
        str is sent as UTF-8; an iterable is read in this thread: while it blocks, the call does not return.
        `user` is an account of the guest by
        its name, numbers like "1000:1000", or None for the sandbox's user. Up to 64 MiB of each stream are kept.
        `limits` bind it and all that it starts, as long as it is not the guest's root, who can leave them.

        Raises UsageError for an account that is not there, GuestError when the program cannot be started (ENOENT,
        EACCES), CommandError with `check` when it does not exit with 0, SandboxStateError, SandboxLostError.
        """
        check_stdin(stdin, "__iter__")
        call = Call(self._bridge)
        return call.run(
            self._sandbox.exec,
            command,
            cwd=cwd,
            env=env,
            stdin=stdin if stdin is None or isinstance(stdin, str | bytes) else call.stream(stdin),
            timeout_s=timeout_s,
            check=check,
            user=user,
            limits=limits,
        )

    def spawn(
        self,
        command: Command,
        *,
        cwd: GuestPath | None = None,
        env: Mapping[str, str] | None = None,
        merge_output: bool = False,
        pty: tuple[int, int] | None = None,
        user: str | None = None,
        limits: ExecLimits | None = None,
    ) -> Process:
        """Start a command and return it running, with live streams. Read them: what is not read stops its writer.

        With `merge_output` standard error goes down the same pipe as standard output. `pty` is (rows, cols) of a
        terminal that the command gets instead of pipes, as the leader of its session; $TERM is xterm-256color then,
        unless `env` names another. `limits` are those of `exec`, as are the errors.
        """
        process = Call(self._bridge, undo=aio_process.Process.kill_all).run(
            self._sandbox.spawn,
            command,
            cwd=cwd,
            env=env,
            merge_output=merge_output,
            pty=pty,
            user=user,
            limits=limits,
        )
        return Process(self._bridge, process)

    def forward(self, port: int, *, host: str = LOCALHOST, host_port: int = 0) -> Forward:
        """Make a TCP server in the guest reachable; the result is closed by leaving `with`, or by `close`.

        It listens on `host`, an address of this host (0.0.0.0 is every network it is in), at `host_port`
        or a free one, until it is closed. Each connection is carried to 127.0.0.1 in the guest, or ::1 where
        only that listens; one that the guest refuses is broken off.

        Raises UsageError, HostError when the address is in use, SandboxStateError, SandboxLostError.
        """

        async def forward() -> aio_ingress.Forward:
            return await self._sandbox.forward(port, host=host, host_port=host_port)

        call = Call(self._bridge, undo=aio_ingress.Forward.close)
        return Forward(self._bridge, call.run(forward))

    def checkpoint(
        self, target: str | os.PathLike[str], *, memory: bool = False, stop: bool = False
    ) -> Checkpoint:
        """Save the sandbox as it is at this instant, and return what new ones start from. It runs on.

        target: a name in the user's store, or a path: an os.PathLike, or a str with a slash. memory: with the running
        programs too; else the disk alone. stop: close the sandbox then. Raises as `taskvm.Sandbox.checkpoint`.
        """
        saved = self._bridge.call(self._sandbox.checkpoint, target, memory=memory)
        if stop:
            self.close()
        return Checkpoint(saved)

    def fork(self, **changes: Unpack[ResumeArguments]) -> Sandbox:
        """Start a copy of this running sandbox and return it. See `taskvm.Sandbox.fork`."""
        (child,) = self.fork_many(1, **changes)
        if isinstance(child, TaskvmError):
            raise child
        return child

    def fork_many(
        self,
        count: int,
        *,
        each: Callable[[int], ResumeArguments] | None = None,
        **changes: Unpack[ResumeArguments],
    ) -> list[Sandbox | TaskvmError]:
        """Start `count` copies as `fork` does, all of one instant. See `taskvm.Sandbox.fork_many`."""
        call = Call(self._bridge, undo=self._close_all)
        own = changes_of_copies(count, changes, each)  # here: it is the caller's thread
        for one in own:
            if "on_progress" in one:
                one["on_progress"] = call.callback(one["on_progress"])

        async def start() -> list[aio.Sandbox | TaskvmError]:
            started = await self._sandbox.fork_many(count, each=own.__getitem__)
            for one in started:
                if isinstance(one, aio.Sandbox):
                    self._bridge.own(one, one.close)
            return started

        return [
            Sandbox(self._bridge, one) if isinstance(one, aio.Sandbox) else one
            for one in call.run(start)
        ]

    # What it changed.

    def changes(
        self,
        path: GuestPath = "/workspace",
        *,
        limits: CopyLimits = CHANGE_LIMITS,
    ) -> ChangeSet:
        """Copy what the guest changed in the review mount at `path`, to be looked at and applied.

        The set is of this moment: take it when the programs that write there have ended. Raises UsageError when
        nothing is mounted there in the mode "review", CopyError when there are more files than `limits` allow,
        HostError, SandboxStateError, SandboxLostError.
        """
        return self._bridge.call(self._sandbox.changes, path, limits=limits)

    def discard(self, path: GuestPath = "/workspace") -> None:
        """Drop what the guest changed in the review mount at `path`: it shows the host's files as they are now.

        Raises GuestError (EBUSY) while a program of the guest has a file open or its directory there; UsageError,
        SandboxStateError, SandboxLostError.
        """
        self._bridge.call(self._sandbox.discard, path)

    def close(self) -> None:
        """End the sandbox and everything in it, and remove what it kept on the host. Idempotent.

        What the guest's programs have written to mounts is on the host; its own disk is gone. Ctrl-C ends the waiting
        only: the rest is released all the same. Does nothing in a forked child: the sandbox is its parent's.
        """
        self._bridge.release(self._close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def _close(self) -> None:
        await _close(self._bridge, self._sandbox)

    async def _close_all(self, started: Sequence[aio.Sandbox | TaskvmError]) -> None:
        for one in started:
            if isinstance(one, aio.Sandbox):
                await _close(self._bridge, one)


async def _close(bridge: Bridge, sandbox: aio.Sandbox) -> None:
    try:
        await sandbox.close()
    finally:
        bridge.disown(sandbox)
