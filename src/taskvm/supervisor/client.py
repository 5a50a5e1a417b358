"""The supervisor as a program talks to it: each call is a connection of its own, so that none waits for another."""

from __future__ import annotations

import builtins
import os
import signal as signals
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from taskvm.arguments import check_signal
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.progress import tell_terminal
from taskvm.resources import ExecLimits
from taskvm.supervisor.attachment import Attachment
from taskvm.supervisor.connection import NoneRunsError, connect
from taskvm.supervisor.place import Place
from taskvm.supervisor.ports import Caller
from taskvm.wire import supervision as messages
from taskvm.wire.supervision import ExecStatus, Launch, Notice, SandboxStatus, SupervisorStatus

if TYPE_CHECKING:
    from taskvm.checkpoints.checkpoint import Checkpoint
    from taskvm.files import GuestPath

_T = TypeVar("_T")


class Supervisor:
    """The process that holds this user's sandboxes. The first `start` starts it; everything else only finds it.

    A sandbox is named by its name, its id or the beginning of its id. Everything raises UsageError for one that is not
    there, HostError when the supervisor does not answer or is of another version, and what the operation raises.
    """

    def __init__(self) -> None:
        self._place = Place.of_user()

    # Sandboxes.

    async def start(
        self,
        options: Mapping[str, object],
        *,
        launch: Launch | None = None,
        name: str | None = None,
        variables: Mapping[str, str] | None = None,
        on_progress: Callable[[str], None] = tell_terminal,
    ) -> SandboxStatus:
        """Start a sandbox that outlives this program.

        options: those of `taskvm run` by their names, as texts: `{"mounts": ["/src:/workspace:ro"], "memory": 1024}`.
            Paths of the host are absolute.
        launch: its main command: it ends with it. None: it lives until it is stopped, or a limit ends it.
        variables: the values that `secrets` of `options` name.

        Cancelling this, or this program's end, before it returns ends what was started.
        """
        request = messages.StartRequest(
            options=dict(options), variables=dict(variables or {}), name=name, launch=launch
        )
        async with self._calling(request, starts=True) as caller:
            caller.on_notice = lambda notice: _report(notice, on_progress)
            return await caller.ask(request, SandboxStatus)

    async def list(self, *, ended: bool = False) -> builtins.list[SandboxStatus]:
        """Return the sandboxes that run; with `ended` also those that have ended within the last hour."""
        request = messages.ListRequest(ended=ended)
        try:
            return await self._ask(request, builtins.list[SandboxStatus])
        except NoneRunsError:
            return []

    async def stop(self, sandbox: str) -> SandboxStatus:
        """End a sandbox and return what it was, when all of it is released."""
        return await self._ask(messages.StopRequest(sandbox=sandbox), SandboxStatus)

    async def checkpoint(
        self,
        sandbox: str,
        target: str | os.PathLike[str],
        *,
        memory: bool = False,
        stop: bool = False,
    ) -> Checkpoint:
        """Save a sandbox as it is at this instant. Arguments and errors are those of `Sandbox.checkpoint`."""
        from taskvm.checkpoints.checkpoint import (  # the engine, which no other call needs
            Checkpoint,
            checkpoint_path,
        )

        path = checkpoint_path(target)
        request = messages.CheckpointRequest(
            sandbox=sandbox, path=str(path), memory=memory, stop=stop
        )
        await self._ask(request, type(None))
        return Checkpoint.load(path)

    async def publish(self, sandbox: str, port: int, *, host_port: int = 0) -> str:
        """Make a TCP server of the guest reachable until the sandbox ends, as `Sandbox.forward`; return `host:port`."""
        request = messages.PublishRequest(sandbox=sandbox, port=port, host_port=host_port)
        return await self._ask(request, str)

    async def policy(self, sandbox: str) -> Policy:
        """Return what a sandbox may reach now."""
        return await self.change_policy(sandbox)

    async def change_policy(
        self,
        sandbox: str,
        policy: Policy | None = None,
        *,
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
    ) -> Policy:
        """Replace a sandbox's policy (None: keep it), allow and deny further hosts; return what holds then.

        As `Sandbox.change_policy`: what is open and might not be allowed is cut.
        """
        request = messages.PolicyRequest(
            sandbox=sandbox,
            file=None if policy is None else policy.to_toml(),
            allow=list(allow),
            deny=list(deny),
        )
        return Policy.from_text(await self._ask(request, str))

    async def put_secret(self, sandbox: str, secret: Secret) -> str:
        """Add a secret, or replace the one of its name, as `Sandbox.put_secret`; return its placeholder."""
        request = messages.SecretRequest(
            sandbox=sandbox, name=secret.name, value=secret.reveal(), hosts=list(secret.hosts),
            headers=list(secret.headers), places=list(secret.places), shape=secret.shape,
        )  # fmt: skip
        return await self._ask(request, str)

    async def revoke_secret(self, sandbox: str, name: str) -> None:
        """Let a secret of a sandbox go nowhere from now on, as `Sandbox.revoke_secret`."""
        await self._ask(messages.SecretRequest(sandbox=sandbox, name=name), str)

    async def copy_in(
        self,
        sandbox: str,
        host_path: str | os.PathLike[str],
        guest_path: GuestPath,
        *,
        into: bool = False,
    ) -> None:
        """Copy a file or a tree of the host to `guest_path`, as `Files.copy_in`.

        With `into`, where that is a directory, the copy goes into it under its own name, as with cp(1).
        """
        await self._copy("in", sandbox, host_path, guest_path, into)

    async def copy_out(
        self, sandbox: str, guest_path: GuestPath, host_path: str | os.PathLike[str]
    ) -> None:
        """Copy a file or a tree of the guest to `host_path`, where nothing may be yet, as `Files.copy_out`."""
        await self._copy("out", sandbox, host_path, guest_path, into=False)

    # Commands.

    async def exec(
        self,
        sandbox: str,
        command: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        pty: tuple[int, int] | None = None,
        timeout_s: float | None = None,
        stdin: bool = True,
        limits: ExecLimits | None = None,
    ) -> Attachment:
        """Start a command in a sandbox and return it attached; the arguments are those of `Sandbox.spawn`.

        Without `stdin` its standard input is empty, as is right for one that is left alone. Nothing of its output is
        skipped without a terminal: it waits for this program, until that detaches.
        """
        launch = Launch(
            command=[*command],
            cwd=cwd,
            env=dict(env or {}),
            user=user,
            pty=pty,
            timeout_s=timeout_s,
            stdin=stdin,
            limits=limits,
        )
        return await self._attach(messages.ExecRequest(sandbox=sandbox, launch=launch))

    async def attach(
        self,
        sandbox: str,
        number: int | None = None,
        *,
        size: tuple[int, int] | None = None,
        follow: bool = True,
    ) -> Attachment:
        """Attach to a command of a sandbox: the main one, or the last that runs, unless `number` names another.

        What is kept of its past output comes first. `size` is (rows, cols) of the terminal it is shown on. Without
        `follow` only the past output comes. A command that has ended is there for as long as its sandbox is listed.
        """
        request = messages.AttachRequest(sandbox=sandbox, exec=number, size=size, follow=follow)
        return await self._attach(request)

    async def kill(self, sandbox: str, number: int, *, signal: int = signals.SIGTERM) -> None:
        """Send `signal` to the process group of the command `number`. Raises UsageError when that has ended."""
        check_signal(signal)
        await self._ask(
            messages.KillRequest(sandbox=sandbox, exec=number, signal=signal), type(None)
        )

    async def kill_all(self, sandbox: str, number: int) -> None:
        """Kill everything that the command `number` started, also what it left running when it ended.

        Raises UsageError for a command that is not there, or of which nothing is left.
        """
        await self._ask(messages.KillRequest(sandbox=sandbox, exec=number, all=True), type(None))

    # The supervisor itself.

    async def status(self) -> SupervisorStatus | None:
        """Return what the supervisor is, of whatever version; None when none runs."""
        try:
            return await self._ask(messages.StatusRequest(), SupervisorStatus)
        except NoneRunsError:
            return None

    async def shut_down(self) -> bool:
        """End all sandboxes and the supervisor, of whatever version. Returns whether one was running."""
        try:
            await self._ask(messages.ShutdownRequest(), type(None))
        except NoneRunsError:
            return False
        return True

    # How.

    async def _copy(
        self,
        direction: messages.Direction,
        sandbox: str,
        host_path: str | os.PathLike[str],
        guest_path: GuestPath,
        into: bool,
    ) -> None:
        request = messages.CopyRequest(
            sandbox=sandbox,
            into=into,
            direction=direction,
            host=_absolute(host_path),
            guest=str(guest_path),
        )
        await self._ask(request, type(None))

    async def _attach(self, request: messages.ExecRequest | messages.AttachRequest) -> Attachment:
        caller = await connect(self._place, request.op, request.sandbox)
        try:
            status = await caller.ask(request, ExecStatus)
            return Attachment(
                caller, status, partial(self.kill_all, request.sandbox, status.number)
            )
        except BaseException:
            caller.close()
            raise

    async def _ask(self, request: messages.Request, kind: type[_T]) -> _T:
        async with self._calling(request) as caller:
            return await caller.ask(request, kind)

    @asynccontextmanager
    async def _calling(
        self, request: messages.Request, *, starts: bool = False
    ) -> AsyncIterator[Caller]:
        caller = await connect(self._place, request.op, _subject(request), starts=starts)
        try:
            yield caller
        finally:
            caller.close()


def _subject(request: messages.Request) -> str | None:
    """Return the sandbox that a request is for, as its user named it."""
    subject = getattr(request, "sandbox", None)
    return subject if isinstance(subject, str) else None


def _absolute(path: str | os.PathLike[str]) -> str:
    return str(Path(path).absolute())  # the supervisor has another working directory


def _report(notice: Notice, on_progress: Callable[[str], None]) -> None:
    if notice.progress is not None:
        on_progress(notice.progress)
