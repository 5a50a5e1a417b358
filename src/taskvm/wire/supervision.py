"""The maps between a command line and the supervisor of its user's sandboxes (docs/supervisor.md, "The protocol").

A connection carries one call, in the frames of `wire/frames.py`: the supervisor's HELLO (`Greeting`), one OPEN (a
`Request`), NOTICEs on SIGNAL frames, one REPLY (`Answer`), and for a call that is attached to a command DATA both ways
and one EXIT (`Ended`). Both sides are the same user's programs of the same version; every map is closed and
bounded by its frame all the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from taskvm import errors
from taskvm.egress.secret import Place
from taskvm.errors import GuestError, GuestProtocolError, TaskvmError
from taskvm.resources import ExecLimits

SandboxState = Literal["running", "paused", "ended"]
# These are served to a client of any version: it must be able to end a supervisor of another.
ANY_VERSION = frozenset({"status", "shutdown"})
Direction = Literal["in", "out"]
_T = TypeVar("_T")
# Those that are made of operation, cause and next step, by their name on the wire.
_PLAIN_ERRORS: dict[str, type[TaskvmError]] = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, TaskvmError)
    and kind.__init__ is TaskvmError.__init__
}


class MessageError(Exception):
    """Raised by `decode` for bytes that are not the message asked for."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A closed map."""


class Greeting(_Message, frozen=True, kw_only=True):
    """The supervisor's first word. A client of another version says nothing but `status` and `shutdown`."""

    version: str
    pid: int


# What a client asks. `op` is the tag; the operation's function is in supervisor/operations.py.


class Request(_Message, frozen=True, kw_only=True, tag_field="op"):
    """What a client asks; `op` is the tag."""

    @property
    def op(self) -> str:
        """The operation's name."""
        return str(self.__struct_config__.tag)


class ListRequest(Request, frozen=True, kw_only=True, tag="list"):
    """Answered by a list of SandboxStatus; `ended` asks for those that have ended too."""

    ended: bool = False


class Launch(_Message, frozen=True, kw_only=True):
    """A command: what `Sandbox.spawn` takes. `pty` is (rows, cols).

    Without `stdin` its standard input is at its end: a command that nobody is attached to would wait for it.
    """

    command: list[str]
    cwd: str | None = None
    env: dict[str, str] = {}
    user: str | None = None
    pty: tuple[int, int] | None = None
    stdin: bool = True
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    limits: ExecLimits | None = None


class StartRequest(Request, frozen=True, kw_only=True, tag="start"):
    """Start a sandbox that ends with its command, or without one lives until it is stopped. Answered by SandboxStatus.

    `options` are those of `taskvm run` by their names, `variables` the part of the client's environment that they name.
    """

    options: dict[str, Any]
    variables: dict[str, str] = {}
    name: str | None = None
    launch: Launch | None = None


class ExecRequest(Request, frozen=True, kw_only=True, tag="exec"):
    """Start a command in a sandbox and be attached to it. Answered by ExecStatus; then as `attach`.

    Without a terminal nothing of its output is dropped: it waits for this client.
    """

    sandbox: str
    launch: Launch


class AttachRequest(Request, frozen=True, kw_only=True, tag="attach"):
    """Follow a command: its past output as far as it is kept, then what comes. Answered by ExecStatus.

    `exec` None is the sandbox's main command, or else the last one that runs. `follow` False: past output only.
    """

    sandbox: str
    exec: int | None = None
    size: tuple[int, int] | None = None
    follow: bool = True


class KillRequest(Request, frozen=True, kw_only=True, tag="kill"):
    """Send a signal to a command's process group; `all`: end everything that it started. Answered by None.

    With `all` also after the end of the command itself, for as long as something of it runs.
    """

    sandbox: str
    exec: int
    signal: Annotated[int, Meta(ge=1, le=64)] = 15
    all: bool = False


class StopRequest(Request, frozen=True, kw_only=True, tag="stop"):
    """End a sandbox. Answered by its SandboxStatus when all is released."""

    sandbox: str


class CheckpointRequest(Request, frozen=True, kw_only=True, tag="checkpoint"):
    """Save a sandbox as the new checkpoint `path`, which is absolute. Answered by None."""

    sandbox: str
    path: str
    memory: bool = False
    stop: bool = False


class CopyRequest(Request, frozen=True, kw_only=True, tag="copy"):
    """Copy a tree: `host` is an absolute path. Answered by None.

    `into`: where `guest` is a directory, the copy goes into it, under its own name.
    """

    sandbox: str
    direction: Direction
    host: str
    guest: str
    into: bool = False


class PublishRequest(Request, frozen=True, kw_only=True, tag="publish"):
    """Make a TCP server of the guest reachable until the sandbox ends. Answered by its address, `host:port`."""

    sandbox: str
    port: int
    host_port: int = 0


class PolicyRequest(Request, frozen=True, kw_only=True, tag="policy"):
    """Change what a sandbox may reach, or only ask. Answered by the policy file that says what holds then.

    `file` is a policy file's text that replaces it; `allow` and `deny` are hosts added after and before it.
    """

    sandbox: str
    file: str | None = None
    allow: list[str] = []
    deny: list[str] = []


class SecretRequest(Request, frozen=True, kw_only=True, tag="secret"):
    """Add a secret, or replace the one of its name; `value` None: revoke it. Answered by its placeholder."""

    sandbox: str
    name: str
    value: str | None = None
    hosts: list[str] = []
    headers: list[str] = []
    places: list[Place] = []
    shape: str = ""

    def __repr__(self) -> str:
        return f"SecretRequest(sandbox={self.sandbox!r}, name={self.name!r})"


class StatusRequest(Request, frozen=True, kw_only=True, tag="status"):
    """Answered by SupervisorStatus, whatever the client's version."""


class ShutdownRequest(Request, frozen=True, kw_only=True, tag="shutdown"):
    """End all sandboxes and the supervisor. Answered by None, whatever the client's version."""


# What the supervisor answers.


class Refusal(_Message, frozen=True, kw_only=True):
    """An error of ours on its way to the client."""

    kind: str
    operation: str
    cause: str
    next_step: str = ""
    errno: int = 0
    call: str = ""

    @classmethod
    def of(cls, error: TaskvmError) -> Refusal:
        """Describe `error`, so that `to_error` makes its equal."""
        errno, call = (error.errno, error.call) if isinstance(error, GuestError) else (0, "")
        if isinstance(error, GuestProtocolError):
            return cls(
                kind="GuestProtocolError", operation=error.port, cause=error.reason
            )  # its two arguments
        return cls(
            kind=type(error).__name__,
            operation=error.operation,
            cause=error.cause,
            next_step=error.next_step,
            errno=errno,
            call=call,
        )

    def to_error(self) -> TaskvmError:
        """Return the error; one whose class is not known here is a TaskvmError."""
        if self.kind == "GuestError":
            return GuestError(self.operation, self.errno, self.call)
        if self.kind == "GuestProtocolError":
            return GuestProtocolError(self.operation, self.cause)
        return _PLAIN_ERRORS.get(self.kind, TaskvmError)(self.operation, self.cause, self.next_step)


class Answer(_Message, frozen=True, kw_only=True):
    """The one reply: a result of the kind that belongs to the request, or why there is none."""

    result: msgspec.Raw = msgspec.Raw(b"\xc0")  # nil
    error: Refusal | None = None


class ExecStatus(_Message, frozen=True, kw_only=True):
    """A command of a sandbox. `number` is its `Process.id`; `exit_code` is None while it runs."""

    number: int
    command: str
    pty: bool
    age_s: float
    attached: int
    main: bool = False
    exit_code: int | None = None


class SandboxStatus(_Message, frozen=True, kw_only=True):
    """A sandbox that the supervisor holds, and what it uses of the host. Sizes are bytes.

    `state` is "running", "paused", or "ended", for which `outcome` says why. `idle_left_s` and `life_left_s` are the
    seconds until its idle and life limits end it; None without such a limit. `forwards` are `host:port` → guest port.
    """

    id: str
    name: str | None
    image: str | None
    state: SandboxState
    age_s: float
    cpu_s: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0
    connections: int = 0
    idle_left_s: float | None = None
    life_left_s: float | None = None
    forwards: dict[str, int] = {}
    execs: list[ExecStatus] = []
    outcome: str = ""


class SupervisorStatus(_Message, frozen=True, kw_only=True):
    """The supervisor itself. `sandboxes` counts those that have not ended."""

    version: str
    pid: int
    age_s: float
    sandboxes: int
    directory: str


class Notice(_Message, frozen=True, kw_only=True):
    """Something on the way: a line about work that takes long, or how many bytes of a channel were dropped."""

    progress: str | None = None
    channel: int = 0
    skipped: int = 0


class Ended(_Message, frozen=True, kw_only=True):
    """The last word about a command one was attached to; `running` says that it goes on without this client.

    `usage` has the fields of ExecUsage.
    """

    exit_code: int = 0
    signal: int | None = None
    timed_out: bool = False
    running: bool = False
    usage: dict[str, int | float] | None = None
    error: Refusal | None = None


# What a client says about the command it is attached to.


class Command(_Message, frozen=True, kw_only=True, tag_field="do"):
    """On a SIGNAL frame; `do` is the tag."""


class Kill(Command, frozen=True, kw_only=True, tag="kill"):
    """Send a signal to the command's process group; `all`: end everything that it started."""

    signal: Annotated[int, Meta(ge=1, le=64)] = 15
    all: bool = False


class Resize(Command, frozen=True, kw_only=True, tag="resize"):
    """The client's terminal has this size now."""

    rows: int
    cols: int


AnyCommand = Kill | Resize


class _Envelope(msgspec.Struct, frozen=True):
    op: str


def encode(message: object) -> bytes:
    """Return the payload of a frame."""
    return msgspec.msgpack.encode(message)


def raw(result: object) -> msgspec.Raw:
    """Return a result as part of an Answer."""
    return msgspec.Raw(encode(result))


def decode(payload: bytes | memoryview, kind: type[_T]) -> _T:
    """Return the message in `payload`. Raises MessageError; its text repeats nothing of the message."""
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"it is not a {getattr(kind, '__name__', kind)}: {error}") from None


def decode_command(payload: bytes | memoryview) -> AnyCommand:
    """Return what a SIGNAL frame of a client says. Raises MessageError."""
    try:
        command: AnyCommand = msgspec.msgpack.decode(payload, type=AnyCommand)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"it is not a command: {error}") from None
    return command


def name_operation(payload: bytes | memoryview) -> str:
    """Return the `op` of a request, whatever else is in it. Raises MessageError."""
    return decode(payload, _Envelope).op
