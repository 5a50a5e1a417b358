"""A sandbox: an untrusted Linux guest with its mounts, its policy and its secrets. The object a user holds in hand.

    async with Sandbox.create(mounts={"/workspace": HostDir(".")}) as vm:
        result = await vm.exec(["pytest", "-q"], cwd="/workspace", timeout_s=600)

Life: `running` → `closed`, or `lost` when the guest ends, stops answering or breaks the protocol.
Everything a sandbox owns (processes, descriptors, its directory on the host) is released on the way to `closed`,
whatever happens.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import SIGKILL
from types import TracebackType
from typing import Literal, Self, Unpack

from taskvm.arguments import check_stdin, check_timeout, tell_command
from taskvm.checkpoints.checkpoint import Checkpoint, checkpoint_path, find_checkpoint
from taskvm.checkpoints.forking import fork_guest
from taskvm.checkpoints.saving import save
from taskvm.commands import Command, Commands
from taskvm.egress.oversight import Oversight
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.errors import (
    CommandError,
    GuestError,
    SandboxLostError,
    SandboxStateError,
    TaskvmError,
    UsageError,
)
from taskvm.files import Files, GuestPath
from taskvm.fs.provider import Provider
from taskvm.guest import Guest
from taskvm.launch import launch
from taskvm.limits import LimitArguments
from taskvm.net.gateway import Gateway
from taskvm.net.ingress import LOCALHOST, Forward
from taskvm.opening import Opening
from taskvm.options import (
    Machinery,
    ResumeArguments,
    SandboxOptions,
    change_options,
    changes_of_copies,
    check_policy,
    check_secret,
    is_writable_in,
    read_options,
)
from taskvm.pool import WarmPool
from taskvm.process import KILL_TIMEOUT_S, Capture, ExecResult, Process
from taskvm.progress import tell_terminal
from taskvm.resources import ExecLimits
from taskvm.review.changes import ChangeSet
from taskvm.review.mounted import ReviewMount
from taskvm.review.survey import CHANGE_LIMITS, take_changes
from taskvm.treecopy import CopyLimits
from taskvm.usage import Statistics, measure
from taskvm.vm.warm import AcceleratorChoice
from taskvm.wire.control import Started

State = Literal["running", "lost", "closed"]


class Sandbox:
    """A running sandbox. Make one with `create`; it is closed by leaving `async with` or by `close`.

    `files` are the guest's files. `id` names the sandbox in the audit log and is the guest's host name.
    """

    def __init__(self, options: SandboxOptions, guest: Guest) -> None:
        self._guest = guest
        self._options = options
        self._state: State = "running"
        self._reason = ""
        self._closing = asyncio.Lock()
        self._started_s = time.monotonic()
        self.id: str = guest.id
        self.files: Files = Files(guest.control, guest.user.uid, guest.user.gid)
        self._commands = Commands(guest, self.files, options)
        guest.on_lost = self._lose
        if guest.lost is not None:  # a copy, while others of its fork were still starting
            self._lose(guest.lost)

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
    ) -> Opening[Sandbox]:
        """Start a sandbox: `await` the result, or use it with `async with`.

        mounts: guest path → provider, such as `HostDir(".")`; the path is made when missing.
        allow: hosts that may be reached: `api.example.com`, `*.example.com` (subdomains), with or without
        `:port`. None: nothing.
        allow_addresses: addresses or networks that are otherwise refused (loopback, private, metadata), such as
            `127.0.0.1:8443`. The name must be allowed as well.
        policy: rules with methods and paths, such as `Policy.from_file`; they come before `allow`.
        oversight: who is asked about hosts that no rule names, and hooks on requests and responses.
        secrets: values that the guest never sees; it finds a placeholder in the variable of the secret's name.
        env: variables for every command. resolve: name → address, or several with commas, instead of looking it up.
        extra_ca_files: PEM files that upstream certificates are verified with, besides the host's own.
        passthrough: allowed hosts whose TLS is not intercepted, for programs that pin certificates; no secret can be
            for one, and the guest trusts this host's authorities besides (a second for each program without KVM).
        audit_path: file that every egress decision is appended to as a JSON line; default below the user's
        state directory.
        image: a name or digest of the image store; default the standard image, built when missing (minutes, once).
        checkpoint: what `checkpoint` returned, or its name or path, to start from instead of an image.
        cpus: virtual CPUs (2). memory_mib: guest memory in MiB (512). Both are the checkpoint's if not given, and for
        one with memory no others can be given. accel: "auto" proves KVM before it believes in it.
        warm: start from the saved memory of a booted guest (made on first use); False boots.
        pool: machines started ahead to take one from.
        on_progress: called with a line about work that takes seconds. By default a terminal's standard error has it.
        limits: `max_duration_s` and the other fields of `Limits`.

        Raises UsageError for wrong arguments; UnavailableError, ImageError, CheckpointError or HostError when this
        host cannot start a sandbox; SandboxLostError when the guest does not come up. Nothing is left behind then.
        """
        options = read_options(
            Machinery(image, find_checkpoint(checkpoint), cpus, memory_mib, accel, warm, pool),
            mounts=mounts, allow=allow, allow_addresses=allow_addresses, policy=policy, oversight=oversight,
            secrets=secrets, env=env, resolve=resolve, extra_ca_files=extra_ca_files, passthrough=passthrough,
            audit_path=audit_path,
            on_progress=on_progress, **limits,
        )  # fmt: skip
        return Opening(partial(cls._start, options))

    @classmethod
    async def _start(cls, options: SandboxOptions) -> Sandbox:
        return cls(options, await launch(options))

    # What it is.

    def __repr__(self) -> str:
        return f"<Sandbox {self.id} {self._state}>"

    @property
    def state(self) -> State:
        """`running`, `lost` (the guest is gone) or `closed`."""
        return self._state

    @property
    def placeholders(self) -> Mapping[str, str]:
        """What the guest sees instead of each secret, by the secret's name."""
        return dict(self._guest.placeholders)

    def put_secret(self, secret: Secret) -> str:
        """Add a secret, or replace the one of this name, and return its placeholder, which stays the same.

        Commands that start from now on find it in the variable of its name. A value that was replaced is still
        looked for in what leaves; connections to a host that it is no longer for are cut. Raises UsageError when
        one of its hosts is not allowed, or `env` has the name.
        """
        self._require_running("give a sandbox a secret")
        check_secret("change a sandbox", secret)
        if secret.name in self._options.env:
            raise UsageError(
                f"give a sandbox the secret {secret.name}", "env has a variable of the same name"
            )
        self._options.passthrough.check_secret(secret)
        return self._gateway.put_secret(secret)

    def revoke_secret(self, name: str) -> None:
        """Let a secret go nowhere from now on; requests with its placeholder are refused.

        Connections to its hosts are cut: a request may be on its way with the value.

        Raises UsageError for a secret that the sandbox does not have.
        """
        self._require_running("revoke a secret of a sandbox")
        self._gateway.revoke_secret(name)

    @property
    def policy(self) -> Policy:
        """What it may reach now."""
        return self._gateway.policy

    def change_policy(self, policy: Policy) -> None:
        """Judge by `policy` from now on, such as `vm.policy.allowing("example.com")`.

        Connections to hosts whose rules are not the same, or the same with more after them, are cut at
        once. Raises SandboxStateError, SandboxLostError when it does not run.
        """
        self._require_running("change a sandbox's policy")
        check_policy("change a sandbox's policy", policy)
        self._gateway.change_policy(policy)

    @property
    def audit_path(self) -> Path:
        """The file of egress decisions, one JSON object in a line."""
        return self._guest.audit_path

    @property
    def accelerator(self) -> str:
        """What runs the guest: "kvm" or "tcg"."""
        return self._guest.machine.shape.accelerator

    @property
    def host_pid(self) -> int:
        """The host's process that supervises QEMU."""
        return self._guest.machine.pid

    def statistics(self) -> Statistics:
        """Return what it uses of the host now. Raises SandboxStateError, SandboxLostError when it does not run."""
        self._require_running("measure a sandbox")
        return measure(self._guest, time.monotonic() - self._started_s)

    # What it does.

    async def exec(
        self,
        command: Command,
        *,
        cwd: GuestPath | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | bytes | AsyncIterator[bytes] | None = None,
        timeout_s: float | None = None,
        check: bool = False,
        user: str | None = None,
        limits: ExecLimits | None = None,
    ) -> ExecResult:
        """Run a command to its end and return what it wrote and how it ended.

        A list is executed as it is; a str runs in the guest's bash. `cwd` defaults to /workspace when that is
        mounted, else the user's home. `timeout_s`, counted from this call, or cancelling it kills everything that
        the command started. A `stdin` of str is sent as UTF-8; an iterator is left when the command ends.
        `user` is an account of the guest by its name, numbers like "1000:1000", or None for the
        sandbox's user. Up to 64 MiB of each stream are kept. `limits` bind it and all that it starts, as long as it is
        not the guest's root, who can leave them.

        Raises UsageError for an account that is not there, GuestError when the program cannot be started (ENOENT,
        EACCES), CommandError with `check` when it does not exit with 0, SandboxStateError, SandboxLostError.
        """
        check_timeout(timeout_s)
        check_stdin(stdin, "__aiter__")
        capture = Capture()
        process = result = None
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                process = await self.spawn(command, cwd=cwd, env=env, user=user, limits=limits)
                result = await capture.run(process, stdin)
        except TimeoutError:
            if not deadline.expired():
                raise
            result = await self._end_late(process, capture)
        except BaseExceptionGroup as group:
            # One stream's failure (the sandbox is lost) is the command's failure.
            raise group.exceptions[0] from None
        finally:
            if process is not None and result is None:  # else its children may live on
                process.abandon()
        if check and not result.ok:
            raise CommandError(tell_command(command), result)
        return result

    async def spawn(
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
        self._require_running("start a command")
        request = await self._commands.request(
            command, cwd=cwd, env=env or {}, merge_output=merge_output, pty=pty, user=user, limits=limits
        )  # fmt: skip
        text = tell_command(command)
        call = self._guest.control.open_call(request, f"run {text!r} in the guest", (1, 2))
        try:
            started = await call.answer(Started)
        except BaseException as error:
            call.forget(errno=125)
            if isinstance(error, GuestError) and error.call == "chdir":
                operation = f"enter {os.fsdecode(request.cwd)} to run {text!r} in the guest"
                raise GuestError(operation, error.errno, error.call) from error
            raise
        return Process(call, text, started.pid)

    def forward(self, port: int, *, host: str = LOCALHOST, host_port: int = 0) -> Opening[Forward]:
        """Make a TCP server in the guest reachable: `await` the result, or use it with `async with`.

        It listens on `host`, an address of this host (0.0.0.0 is every network it is in), at `host_port`
        or a free one, until it is closed. Each connection is carried to 127.0.0.1 in the guest, or ::1 where
        only that listens; one that the guest refuses is broken off.

        Raises UsageError, HostError when the address is in use, SandboxStateError, SandboxLostError.
        """
        self._require_running(f"forward port {port} of the guest")
        return self._gateway.ingress.forward(port, host, host_port)

    async def checkpoint(
        self, target: str | os.PathLike[str], *, memory: bool = False, stop: bool = False
    ) -> Checkpoint:
        """Save the sandbox as it is at this instant, and return what new ones start from. It runs on.

        target: a name in the user's store, or a path: an os.PathLike, or a str with a slash. memory: with the running
        programs too; else the disk alone. stop: close the sandbox then.

        Everything on the guest's disk is kept. Mounts, policy, secrets and variables are not in it. Programs stand
        still for some tens of milliseconds; connections go on here.

        Raises CheckpointError when it is there already or cannot be written; UsageError for a path that the guest may
        write to, or with `memory` for a mount that cannot be taken up again; SandboxStateError, SandboxLostError.
        """
        self._require_running("save a sandbox")
        path = checkpoint_path(target)
        if any(is_writable_in(provider, path) for provider in self._options.mounts.values()):
            raise UsageError(
                f"save a sandbox as {path}", "the guest may write to it there", "Choose another"
            )
        saved = await save(self._guest, path, memory=memory)
        if stop:
            await self.close()
        return Checkpoint(saved)

    def fork(self, **changes: Unpack[ResumeArguments]) -> Opening[Sandbox]:
        """Start a copy of this running sandbox: `await` the result, or use it with `async with`.

        Its disk, memory and running programs are those of this instant, copied on write; its identity is its own, and
        the connections of its programs are broken off. Options are this sandbox's, or what `changes` says instead, each
        limit by itself; its audit log is its own, and its time begins anew. What its copied programs write to their
        standard output is dropped.

        Mounts are the same ones: a `ro` directory is shared, and of a `review` each has its own changes, which start
        from what this sandbox has changed. What this sandbox writes to directly a copy may only read:
        `fork(mounts={"/workspace": HostDir(".", mode="ro")})`.

        Raises SandboxStateError when a copy would write to the same mount; UsageError, HostError, SandboxLostError.
        """
        return Opening(partial(self._fork, changes))

    async def fork_many(
        self,
        count: int,
        *,
        each: Callable[[int], ResumeArguments] | None = None,
        **changes: Unpack[ResumeArguments],
    ) -> list[Sandbox | TaskvmError]:
        """Start `count` copies as `fork` does, all of one instant; a copy that does not start is its error.

        `each` is called with the number of each copy, from 0, and returns what it is given besides `changes`, such as
        `{"env": {"ATTEMPT": "0"}}`. The copies are in the order of their numbers.
        """
        self._require_running("fork a sandbox")
        present = self._current_options()
        options = [
            change_options(present, **own) for own in changes_of_copies(count, changes, each)
        ]
        started = await fork_guest(self._guest, options)
        return [
            Sandbox(own, one) if isinstance(one, Guest) else one
            for own, one in zip(options, started, strict=True)
        ]

    # What it changed.

    async def changes(
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
        return await take_changes(self.files, self._review(path, "take the changes in"), limits)

    async def discard(self, path: GuestPath = "/workspace") -> None:
        """Drop what the guest changed in the review mount at `path`: it shows the host's files as they are now.

        Raises GuestError (EBUSY) while a program of the guest has a file open or its directory there; UsageError,
        SandboxStateError, SandboxLostError.
        """
        await self._guest.renew(self._review(path, "discard the changes in"))

    async def close(self) -> None:
        """End the sandbox and everything in it, and remove what it kept on the host. Idempotent.

        What the guest's programs have written to mounts is on the host; its own disk is gone. A cancelled call
        releases everything all the same; only what was not written yet may be lost.
        """
        self._guest.control.require_loop(f"close the sandbox {self.id}")
        running = self._state == "running"
        self._state = "closed"
        async with self._closing:  # who comes second waits, and ends what was cancelled
            await self._guest.close(flush=running)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # How.

    async def _fork(self, changes: ResumeArguments) -> Sandbox:
        (child,) = await self.fork_many(1, **changes)
        if isinstance(child, TaskvmError):
            raise child
        return child

    def _current_options(self) -> SandboxOptions:
        # As they are now: a copy revives nothing that was narrowed, replaced or revoked.
        secrets = self._gateway.keyring.usable(self.policy)
        return replace(self._options, policy=self.policy, secrets=secrets)

    async def _end_late(self, process: Process | None, capture: Capture) -> ExecResult:
        """Kill a command whose time is over. One that has not begun yet is killed by its agent as it begins."""
        if process is not None:
            await process.kill_all()
            return capture.result(await process.wait(), timed_out=True)
        await self._guest.control.probe("kill a command that did not begin", KILL_TIMEOUT_S)
        return ExecResult(exit_code=128 + SIGKILL, signal=SIGKILL, timed_out=True)

    @property
    def _gateway(self) -> Gateway:
        assert self._guest.gateway is not None, "a sandbox's guest is equipped"
        return self._guest.gateway

    def _review(self, path: GuestPath, operation: str) -> ReviewMount:
        self._require_running(f"{operation} {path}")
        review = self._guest.reviews.get(str(path))
        if review is None:
            places = ", ".join(self._guest.reviews)
            raise UsageError(
                f"{operation} {path}",
                "no directory is mounted there for review",
                f"Name the place of one that is: {places}"
                if places
                else 'Mount it with HostDir(path, mode="review")',
            )
        return review

    def _require_running(self, operation: str) -> None:
        if self._state == "lost":
            raise SandboxLostError(operation, self._reason, "Start another sandbox")
        if self._state != "running":
            raise SandboxStateError(
                operation, f"the sandbox {self.id} is {self._state}", "Create a new one"
            )

    def _lose(self, error: Exception) -> None:
        if self._state == "running":
            self._state = "lost"
            self._reason = str(error)
