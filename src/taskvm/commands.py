"""What the commands of a sandbox start with: their account, directory, variables and terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from taskvm.accounts import Account, Accounts
from taskvm.arguments import check_variables, read_command
from taskvm.files import Files, GuestPath, encode_path
from taskvm.guest import Guest
from taskvm.options import SandboxOptions
from taskvm.process import pty_size
from taskvm.resources import ExecLimits, bounds_of
from taskvm.wire.control import ExecRequest

Command = str | Sequence[str]
SHELL = "/bin/bash"
# Every terminal emulator of today understands it, and every distribution describes it (ncurses-base).
PTY_TERM = "xterm-256color"
# Number 0 in every guest, whatever its files say.
ROOT = Account(uid=0, gid=0, groups=(0,), name="root", home="/root")
_WORKSPACE = "/workspace"


class Commands:
    """Makes the requests that start commands in `guest`, for a sandbox of these `options`."""

    def __init__(self, guest: Guest, files: Files, options: SandboxOptions) -> None:
        user = guest.user
        self._guest = guest
        self._options = options
        self._accounts = Accounts(files)
        self._own = Account(
            uid=user.uid, gid=user.gid, groups=(user.gid,), name=user.name, home=user.home
        )
        self._environment = {**guest.environment, **options.env}

    async def request(
        self,
        command: Command,
        *,
        cwd: GuestPath | None,
        env: Mapping[str, str],
        merge_output: bool,
        pty: tuple[int, int] | None,
        user: str | None,
        limits: ExecLimits | None,
    ) -> ExecRequest:
        """Return what asks the agent to run `command`, as `Sandbox.spawn` describes it; raises what that raises."""
        account = await self._find_account(user)
        argv = read_command(command, SHELL)
        check_variables(env)
        variables = self._variables(account, env, terminal=pty is not None)
        directory = cwd or await self._start_dir(account)
        return ExecRequest(
            argv=[os.fsencode(item) for item in argv],
            env=[os.fsencode(f"{name}={value}") for name, value in variables.items()],
            cwd=encode_path(directory, f"run {argv[0]!r} in {str(directory)!r}"),
            uid=account.uid,
            gid=account.gid,
            groups=list(account.groups),
            merge=merge_output,
            limits=None if limits is None else bounds_of(limits),
            pty=None if pty is None else pty_size(*pty),
        )

    def _variables(
        self, account: Account, env: Mapping[str, str], *, terminal: bool
    ) -> dict[str, str]:
        variables = {**self._guest.placeholders, **self._environment}
        if account != self._own:
            variables |= account.environment
        if terminal and "TERM" not in self._options.env:
            variables["TERM"] = PTY_TERM
        return {**variables, **env}

    async def _find_account(self, user: str | None) -> Account:
        if user is None:
            return self._own
        return ROOT if user == "root" else await self._accounts.find(user)

    async def _start_dir(self, account: Account) -> GuestPath:
        if _WORKSPACE in self._options.mounts:
            return _WORKSPACE
        if account in (self._own, ROOT):
            return self._own.home
        return await self._accounts.start_dir(account)
