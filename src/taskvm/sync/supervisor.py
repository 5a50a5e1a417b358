"""The supervisor for programs that block: the surface of `taskvm.Supervisor` without `await`."""

from __future__ import annotations

import builtins
import os
import signal as signals
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.files import GuestPath
from taskvm.process import ExecResult
from taskvm.progress import tell_terminal
from taskvm.resources import ExecLimits
from taskvm.supervisor import attachment as aio_attachment
from taskvm.supervisor import client as aio
from taskvm.sync.bridge import Bridge, Call
from taskvm.sync.checkpoint import Checkpoint
from taskvm.sync.process import ByteStream
from taskvm.wire.supervision import Launch, SandboxStatus, SupervisorStatus


class Supervisor:
    """The process that holds this user's sandboxes. The first `start` starts it; everything else only finds it.

    A sandbox is named by its name, its id or the beginning of its id. Everything raises UsageError for one that is not
    there, HostError when the supervisor does not answer or is of another version, and what the operation raises.
    """

    def __init__(self) -> None:
        self._bridge = Bridge.current()
        self._supervisor = aio.Supervisor()

    def start(
        self,
        options: Mapping[str, object],
        *,
        launch: Launch | None = None,
        name: str | None = None,
        variables: Mapping[str, str] | None = None,
        on_progress: Callable[[str], None] = tell_terminal,
    ) -> SandboxStatus:
        """Start a sandbox that outlives this program. The arguments are those of `taskvm.Supervisor.start`."""
        call = Call(self._bridge)
        return call.run(
            self._supervisor.start,
            options,
            launch=launch,
            name=name,
            variables=variables,
            on_progress=call.callback(on_progress),
        )

    def list(self, *, ended: bool = False) -> builtins.list[SandboxStatus]:
        """Return the sandboxes that run; with `ended` also those that have ended within the last hour."""
        return self._bridge.call(self._supervisor.list, ended=ended)

    def stop(self, sandbox: str) -> SandboxStatus:
        """End a sandbox and return what it was, when all of it is released."""
        return self._bridge.call(self._supervisor.stop, sandbox)

    def checkpoint(
        self,
        sandbox: str,
        target: str | os.PathLike[str],
        *,
        memory: bool = False,
        stop: bool = False,
    ) -> Checkpoint:
        """Save a sandbox as it is at this instant. Arguments and errors are those of `Sandbox.checkpoint`."""
        saved = self._bridge.call(
            self._supervisor.checkpoint, sandbox, target, memory=memory, stop=stop
        )
        return Checkpoint(saved)

    def publish(self, sandbox: str, port: int, *, host_port: int = 0) -> str:
        """Make a TCP server of the guest reachable until the sandbox ends, as `Sandbox.forward`; return `host:port`."""
        return self._bridge.call(self._supervisor.publish, sandbox, port, host_port=host_port)

    def policy(self, sandbox: str) -> Policy:
        """Return what a sandbox may reach now."""
        return self._bridge.call(self._supervisor.policy, sandbox)

    def change_policy(
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
        return self._bridge.call(
            self._supervisor.change_policy, sandbox, policy, allow=allow, deny=deny
        )

    def put_secret(self, sandbox: str, secret: Secret) -> str:
        """Add a secret, or replace the one of its name, as `Sandbox.put_secret`; return its placeholder."""
        return self._bridge.call(self._supervisor.put_secret, sandbox, secret)

    def revoke_secret(self, sandbox: str, name: str) -> None:
        """Let a secret of a sandbox go nowhere from now on, as `Sandbox.revoke_secret`."""
        self._bridge.call(self._supervisor.revoke_secret, sandbox, name)

    def copy_in(
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
        self._bridge.call(self._supervisor.copy_in, sandbox, host_path, guest_path, into=into)

    def copy_out(
        self, sandbox: str, guest_path: GuestPath, host_path: str | os.PathLike[str]
    ) -> None:
        """Copy a file or a tree of the guest to `host_path`, where nothing may be yet, as `Files.copy_out`."""
        self._bridge.call(self._supervisor.copy_out, sandbox, guest_path, host_path)

    def exec(
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
        attachment = self._bridge.call(
            self._supervisor.exec,
            sandbox,
            command,
            cwd=cwd,
            env=env,
            user=user,
            pty=pty,
            timeout_s=timeout_s,
            stdin=stdin,
            limits=limits,
        )
        return Attachment(self._bridge, attachment)

    def attach(
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
        attachment = self._bridge.call(
            self._supervisor.attach, sandbox, number, size=size, follow=follow
        )
        return Attachment(self._bridge, attachment)

    def kill(self, sandbox: str, number: int, *, signal: int = signals.SIGTERM) -> None:
        """Send `signal` to the process group of the command `number`. Raises UsageError when that has ended."""
        self._bridge.call(self._supervisor.kill, sandbox, number, signal=signal)

    def kill_all(self, sandbox: str, number: int) -> None:
        """Kill everything that the command `number` started, also what it left running when it ended.

        Raises UsageError for a command that is not there, or of which nothing is left.
        """
        self._bridge.call(self._supervisor.kill_all, sandbox, number)

    def status(self) -> SupervisorStatus | None:
        """Return what the supervisor is, of whatever version; None when none runs."""
        return self._bridge.call(self._supervisor.status)

    def shut_down(self) -> bool:
        """End all sandboxes and the supervisor, of whatever version. Returns whether one was running."""
        return self._bridge.call(self._supervisor.shut_down)


class Attachment:
    """A command that this program is attached to; leave it by leaving `with`, or by `detach`: it runs on.

    `stdout` and `stderr` begin with what is kept of the past output; what a terminal's command writes faster than it
    is read here is skipped, and counted in `skipped`. With a terminal all output is in `stdout`.
    """

    def __init__(self, bridge: Bridge, attachment: aio_attachment.Attachment) -> None:
        self._bridge = bridge
        self._attachment = attachment
        self.number: int = attachment.number
        self.command: str = attachment.command
        self.pty: bool = attachment.pty
        self.stdout: ByteStream = ByteStream(bridge, attachment.stdout)
        self.stderr: ByteStream = ByteStream(bridge, attachment.stderr)

    @property
    def skipped(self) -> int:
        """How many bytes of output have been dropped because they were not read in time."""
        return self._attachment.skipped

    def write(self, data: bytes) -> None:
        """Write to standard input, waiting while the command does not read. Raises BrokenPipeError after its end."""
        self._bridge.call(self._attachment.write, data)

    def close_stdin(self) -> None:
        """Close the command's standard input, for everybody who is attached. Idempotent."""
        self._bridge.call(self._attachment.close_stdin)

    def kill(self, signal: int = signals.SIGTERM) -> None:
        """Send `signal` to the command's group. Nothing happens when it has ended."""
        self._bridge.call(self._attachment.kill, signal)

    def kill_all(self) -> None:
        """Kill everything that the command started, and wait for its end. Raises SandboxLostError.

        After the command's end, what it left behind is killed, and dies without being waited for.
        """
        self._bridge.call(self._attachment.kill_all)

    def resize(self, rows: int, cols: int) -> None:
        """Change the size of the command's terminal; who came last decides. Raises UsageError for an impossible one."""
        self._bridge.call(self._attachment.resize, rows, cols)

    def wait(self) -> ExecResult:
        """Wait until the command has ended; of the main one, until its sandbox has.

        Raises SandboxLostError when the sandbox, or the supervisor, ended before it.
        """
        return self._bridge.call(self._attachment.wait)

    def detach(self) -> None:
        """Leave the command running. Idempotent."""
        self._bridge.release(self._attachment.detach)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()
