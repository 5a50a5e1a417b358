"""The options of a sandbox that every command which creates one has, and how their texts are read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, cast

import click
import msgspec

import taskvm
from taskvm import CheckpointError, ImageError, UsageError
from taskvm.cli import complete
from taskvm.cli.commandlimits import LIMIT_OPTIONS, read_limits
from taskvm.cli.commandlimits import NAMES as LIMITS
from taskvm.cli.group import progress, silent
from taskvm.cli.mounttext import absolute_mount, read_mount
from taskvm.cli.secrettext import read_secret, read_secret_command, read_secret_file

if TYPE_CHECKING:
    from taskvm.limits import LimitArguments

P = ParamSpec("P")

# Of what --private keeps for one mount: several times what the dependencies of a large project take.
PRIVATE_LIMIT = 1 << 30

# What may leave: the same for commands that only ask about it.
POLICY_OPTIONS = (
    click.option(
        "--policy",
        "policy_file",
        metavar="FILE",
        type=click.Path(),
        help="Rules with hosts, methods and paths (TOML or JSON); those of --allow come after them.",
    ),
    click.option(
        "--allow",
        multiple=True,
        metavar="HOST",
        help="A host that may be reached: example.com, *.example.com, with :PORT or not.",
    ),
    click.option(
        "--allow-address",
        "allow_addresses",
        multiple=True,
        metavar="ADDRESS",
        help="An internal address or network that an allowed name may lead to, such as 127.0.0.1:8443.",
    ),
    click.option(
        "--resolve",
        multiple=True,
        metavar="HOST=ADDRESS[,…]",
        help="Use ADDRESS for HOST instead of looking it up; several are tried in this order.",
    ),
)

SANDBOX_OPTIONS = (
    click.option(
        "--image",
        metavar="NAME",
        shell_complete=complete.images,
        help="Image of the store (name or digest). [default: the standard image]",
    ),
    click.option(
        "--checkpoint",
        metavar="NAME|FILE",
        shell_complete=complete.checkpoints,
        help="Start from a saved sandbox: a name of the store, or a path with a slash.",
    ),
    click.option(
        "--cpus", type=int, metavar="N", help="Virtual CPUs. [default: 2, or the checkpoint's]"
    ),
    click.option(
        "--memory",
        type=int,
        metavar="MIB",
        help="Guest memory in MiB. [default: 512, or the checkpoint's]",
    ),
    click.option(
        "--cpu-share",
        type=float,
        metavar="N",
        help="Processors of the host that the guest may use at most, such as 0.5.",
    ),
    click.option(
        "--disk-size",
        type=int,
        metavar="MIB",
        help="Size of the guest's disk in MiB. [default: the image's, 4096]",
    ),
    click.option(
        "--disk-limit",
        type=int,
        metavar="MIB",
        help="What the guest may write to its disk, as MiB of this host's. [default: 16384]",
    ),
    click.option(
        "--free-disk",
        type=int,
        metavar="MIB",
        help="End the sandbox when this host's disk has less free. [default: 1024]",
    ),
    click.option(
        "--mount",
        "-v",  # as of docker run, whose HOST:GUEST[:ro] means the same
        "mounts",
        multiple=True,
        metavar="HOST:GUEST[:MODE]",
        help="Mount a host directory: rw (the default), ro, or review: changes stay in the guest until you apply them. "
        "Or a file: rw or ro.",
    ),
    click.option(
        "--hide",
        multiple=True,
        metavar="PATTERN",
        help="Hide these files of every mount from the guest: .env, *.pem, /secrets/, as in a .gitignore.",
    ),
    click.option(
        "--private",
        multiple=True,
        metavar="PATTERN",
        help="Hide these too, and let the guest have its own there, in memory: node_modules/, .venv/.",
    ),
    click.option(
        "--mount-limit",
        type=click.IntRange(min=0),
        metavar="MIB",
        help="What the guest may add to each directory or file that is mounted rw, in MiB. [default: no limit]",
    ),
    *POLICY_OPTIONS,
    click.option(
        "--secret",
        "secrets",
        multiple=True,
        metavar="NAME@HOST[,…]",
        help="Send the value of the variable NAME to these hosts; the guest sees a placeholder in $NAME. "
        "After the hosts: in=query, in=path, in=body, header=NAME, shape=ghp_*{36}.",
    ),
    click.option(
        "--secret-file",
        "secret_files",
        multiple=True,
        metavar="NAME=FILE@HOST[,…]",
        help="The same with the value from FILE.",
    ),
    click.option(
        "--secret-command",
        "secret_commands",
        multiple=True,
        metavar="NAME=COMMAND@HOST[,…]",
        help="The same with the value that COMMAND prints on this host; with refresh=SECONDS it is run again when that "
        "is older (run, shell).",
    ),
    click.option(
        "--ca-file",
        "ca_files",
        multiple=True,
        metavar="PEM",
        type=click.Path(),
        help="Verify servers with these certificates too.",
    ),
    click.option(
        "--passthrough",
        multiple=True,
        metavar="HOST",
        help="Do not intercept TLS to this allowed host (for programs that pin its certificate).",
    ),
    click.option(
        "--env", "-e", "env", multiple=True, metavar="K=V", help="Set a variable in the guest."
    ),
    click.option(
        "--cwd",
        "-w",
        metavar="DIR",
        help="Working directory in the guest. [default: /workspace if mounted]",
    ),
    click.option(
        "--user",
        "-u",
        metavar="USER",
        help="Account of the guest that runs the command: a name, or UID:GID.",
    ),
    click.option(
        "--timeout",
        type=float,
        metavar="S",
        help="Kill the command after S seconds (exit status 124).",
    ),
    *LIMIT_OPTIONS,
    click.option(
        "--max-duration", type=float, metavar="S", help="End the whole sandbox after S seconds."
    ),
    click.option(
        "--idle-timeout",
        type=float,
        metavar="S",
        help="End the sandbox when nothing has happened in it for S seconds (shell, start, run --detach).",
    ),
    click.option(
        "--idle-pause",
        type=float,
        metavar="S",
        help="Stop its virtual CPUs after S seconds without activity, until the next; 0: never. [default: 30]",
    ),
    click.option(
        "--publish",
        "-p",
        multiple=True,
        metavar="[HOST_PORT:]GUEST_PORT",
        help="Make a TCP server in the guest reachable at 127.0.0.1 of this host.",
    ),
    click.option(
        "--audit",
        metavar="FILE",
        type=click.Path(),
        help="Append each egress decision to FILE as a JSON line.",
    ),
    click.option(
        "--accel",
        type=click.Choice(["auto", "kvm", "tcg"]),
        default="auto",
        show_default=True,
        help="What runs the guest.",
    ),
    click.option("--cold", is_flag=True, help="Boot instead of starting from a warm template."),
    click.option(
        "--quiet",
        "-q",
        is_flag=True,
        help="No progress on standard error, and not what was refused.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxArguments:
    """What the user said about the sandbox, and about the command's place in it."""

    image: str | None
    checkpoint: str | None
    cpus: int | None
    memory: int | None
    cpu_share: float | None
    disk_size: int | None
    disk_limit: int | None
    free_disk: int | None
    mounts: tuple[str, ...]
    hide: tuple[str, ...]
    private: tuple[str, ...]
    mount_limit: int | None
    policy_file: str | None
    allow: tuple[str, ...]
    allow_addresses: tuple[str, ...]
    resolve: tuple[str, ...]
    secrets: tuple[str, ...]
    secret_files: tuple[str, ...]
    secret_commands: tuple[str, ...]
    ca_files: tuple[str, ...]
    passthrough: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str | None
    timeout: float | None
    limit_memory: int | None
    limit_processes: int | None
    limit_cpus: float | None
    limit_disk_read: float | None
    limit_disk_write: float | None
    cpu_weight: int | None
    max_duration: float | None
    idle_timeout: float | None
    idle_pause: float | None
    user: str | None
    publish: tuple[str, ...]
    audit: str | None
    accel: str
    cold: bool
    quiet: bool

    @classmethod
    def of(cls, options: Mapping[str, object]) -> SandboxArguments:
        """Return the arguments that these options are, by their names; the others have their defaults.

        Raises UsageError for one that does not exist, or is of another type.
        """
        blank = click.command()(sandbox_options(_ignore))
        known = blank.make_context("options", []).params
        try:
            if unknown := options.keys() - known.keys():
                raise msgspec.ValidationError(f"there is no option {min(unknown)!r}")
            return msgspec.convert({**known, **options}, cls)
        except msgspec.ValidationError as error:
            raise UsageError("read the options of a sandbox", str(error)) from error

    def portable(self) -> dict[str, object]:
        """Return the options as another process with another working directory understands them (`of`)."""
        absolute = replace(
            self,
            mounts=tuple(absolute_mount(text) for text in self.mounts),
            checkpoint=_absolute(self.checkpoint)
            if self.checkpoint and "/" in self.checkpoint
            else self.checkpoint,
            policy_file=_absolute(self.policy_file),
            ca_files=tuple(str(Path(path).absolute()) for path in self.ca_files),
            audit=_absolute(self.audit),
        )
        return {item.name: getattr(absolute, item.name) for item in fields(self)}

    def variables(self) -> dict[str, str]:
        """Return the values of all secrets, by name, from this process's environment and files. Raises UsageError."""
        return {secret.name: secret.reveal() for secret in self._secrets(None)}

    def _mounts(self) -> dict[str, taskvm.Provider]:
        found: dict[str, taskvm.Provider] = {}
        for text in self.mounts:
            path, provider = self._mount(text)
            if path in found:
                raise UsageError(f"read --mount {text}", f"another one is at {path}")
            found[path] = provider
        return found

    def _mount(self, text: str) -> tuple[str, taskvm.Provider]:
        path, provider = read_mount(text)
        if self.mount_limit is not None and not provider.readonly:
            provider = taskvm.Quota(provider, limit_bytes=self.mount_limit << 20)
        if self.hide and not provider.is_file:
            provider = taskvm.Shadow(provider, self.hide)
        if self.private and not provider.is_file:
            provider = taskvm.Shadow(
                provider, self.private, private=taskvm.Memory(limit_bytes=PRIVATE_LIMIT)
            )
        return path, provider

    @property
    def reviewed(self) -> tuple[str, ...]:
        """The guest's directories that are mounted for review."""
        parts = (text.split(":") for text in self.mounts)
        return tuple(sorted(each[1] for each in parts if each[2:] == ["review"]))

    @property
    def on_progress(self) -> Callable[[str], None]:
        return silent if self.quiet else progress

    @property
    def limits(self) -> taskvm.ExecLimits | None:
        """What the command may use. Raises UsageError."""
        return read_limits(**{name: getattr(self, name) for name in LIMITS})

    def check(self) -> None:
        """Raise UsageError for what a user can see to be wrong before anything starts."""
        if self.image is not None:
            try:
                taskvm.ImageStore().get(self.image)
            except ImageError as error:
                raise UsageError(
                    f"use --image {self.image}", error.cause, error.next_step
                ) from error
        if self.checkpoint is not None:
            try:
                taskvm.Checkpoint.load(self.checkpoint)
            except CheckpointError as error:
                raise UsageError(
                    f"use --checkpoint {self.checkpoint}", error.cause, error.next_step
                ) from error
        _ = self.limits, [published(text) for text in self.publish]
        for option, value in (("timeout", self.timeout), ("idle-timeout", self.idle_timeout)):
            if value is not None and not value > 0:  # so that "nan" is refused too
                raise UsageError(
                    f"use --{option} {value:g}", "it is not a positive number of seconds"
                )

    def create(
        self,
        variables: Mapping[str, str] | None = None,
        on_progress: Callable[[str], None] | None = None,
        oversight: taskvm.Oversight | None = None,
    ) -> taskvm.Opening[taskvm.Sandbox]:
        """Return the sandbox, to be started. Raises UsageError.

        `variables` has the values of its secrets when another process has read them.
        """
        self.check()
        return taskvm.Sandbox.create(
            mounts=self._mounts(),
            policy=read_policy(self.policy_file, self.allow, self.allow_addresses),
            resolve=read_table(self.resolve),
            secrets=self._secrets(variables),
            extra_ca_files=[Path(path) for path in self.ca_files],
            passthrough=self.passthrough,
            env=read_variables(self.env),
            audit_path=self.audit,
            image=self.image,
            checkpoint=self.checkpoint,
            cpus=self.cpus,
            memory_mib=self.memory,
            accel=self.accel,  # type: ignore[arg-type]  # click.Choice has checked it
            warm=not self.cold,
            **self._bounds(),
            on_progress=on_progress or self.on_progress,
            oversight=oversight,
        )

    def _bounds(self) -> LimitArguments:
        """Return what was said of time and disk; what was not has the engine's default."""
        said = {
            "max_duration_s": self.max_duration,
            "idle_pause_s": self.idle_pause,
            "disk_size_mib": self.disk_size,
            "disk_limit_mib": self.disk_limit,
            "free_disk_mib": self.free_disk,
            "cpu_share": self.cpu_share,
        }
        return cast("LimitArguments", {name: said[name] for name in said if said[name] is not None})

    def _secrets(self, variables: Mapping[str, str] | None) -> list[taskvm.Secret]:
        return [
            *(read_secret(text, variables) for text in self.secrets),
            *(read_secret_file(text, variables) for text in self.secret_files),
            *(read_secret_command(text, variables) for text in self.secret_commands),
        ]


def sandbox_options(
    command: Callable[Concatenate[SandboxArguments, P], None],
) -> Callable[..., None]:
    """Give `command` the options of a sandbox; it gets them as one value."""

    @functools.wraps(command)
    def collect(*args: P.args, **values: P.kwargs) -> None:
        own = {field.name: values.pop(field.name) for field in fields(SandboxArguments)}
        command(SandboxArguments(**own), *args, **values)  # type: ignore[arg-type]  # click has converted them

    for option in reversed(SANDBOX_OPTIONS):
        collect = option(collect)
    return collect


def read_policy(
    policy_file: str | None, allow: Iterable[str], allow_addresses: Iterable[str]
) -> taskvm.Policy:
    """Return what the options of a policy mean together."""
    rules = taskvm.Policy.from_file(policy_file) if policy_file else taskvm.Policy()
    return rules.joined(taskvm.Policy.parse(allow, allow_addresses))


def read_table(resolve: Iterable[str]) -> dict[str, str]:
    """Return the table of names that --resolve gives."""
    table: dict[str, str] = {}
    for text in resolve:
        name, addresses = pair(text, "--resolve", "HOST=ADDRESS")
        if name in table:
            raise UsageError(
                f"read --resolve {text}",
                f"another one is for {name}",
                f"Write all of its addresses in one: {name}={table[name]},{addresses}",
            )
        table[name] = addresses
    return table


def _ignore(arguments: SandboxArguments) -> None:
    """For a command that is only parsed."""


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def read_variables(texts: Sequence[str]) -> dict[str, str]:
    """Return the variables that --env gives. Raises UsageError; nothing of this process's environment is taken."""
    for name in texts:
        if name and "=" not in name:
            raise UsageError(
                f"read --env {name}",
                "it is not K=V, and no variable of this host is passed on by itself",
                f'Write --env {name}="${name}", or --secret {name}@HOST for what the guest must not see',
            )
    return dict(pair(text, "--env", "K=V") for text in texts)


def pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UsageError(f"read {option} {text}", f"it is not {form}")
    return name, value


def published(text: str) -> tuple[int, int]:
    host_port, separator, guest_port = text.rpartition(":")
    numbers = [guest_port, host_port] if separator else [guest_port]
    if not all(number.isdecimal() and 0 < int(number) < 65536 for number in numbers):
        raise UsageError(f"read --publish {text}", "it is not GUEST_PORT or HOST_PORT:GUEST_PORT")
    return int(host_port) if separator else 0, int(guest_port)
