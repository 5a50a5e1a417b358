"""The maps of the control port: what the host asks (`*Request`) and what the guest answers, as closed msgpack schemas.

Requests are built by us and encoded; answers come from an untrusted guest and are decoded with every field typed,
bounded by the frame, and unknown keys refused (docs/protocol-control.md).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

# What an entry of an upper directory stands for: a name that is gone, a directory that hides the lower one, one that
# shows another of the lower layer (it was renamed), what was copied from the lower layer, what was made.
Mark = Literal["whiteout", "opaque", "redirect", "copied", "new"]
FileType = Literal["file", "dir", "symlink", "fifo", "socket", "block", "char"]
# The kernel's own limit of an errno (MAX_ERRNO in linux/err.h).
MAX_ERRNO = 4095
# How much of a guest's words an error message repeats.
_MAX_TOLD = 300

_Errno = Annotated[int, Meta(ge=1, le=MAX_ERRNO)]
_Mode = Annotated[int, Meta(ge=0, le=0o7777)]
_Count = Annotated[int, Meta(ge=0)]
_Total = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Owner = Annotated[int, Meta(ge=0, le=2**32 - 1)]
# It is shown to people: a few words, and nothing that a terminal would act on.
_CallName = Annotated[str, Meta(max_length=64, pattern=r"\A[ -~]*\Z")]


class _Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op"):
    """What the host asks; `op` is the tag."""


class PingRequest(_Request, frozen=True, kw_only=True, tag="ping"):
    """Answered even while the guest is quiesced."""


class IdentityFile(msgspec.Struct, frozen=True, kw_only=True):
    """A small file that makes this guest itself; with `append`, added to what is there unless it already is."""

    path: bytes
    data: bytes
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    append: bool = False


class IdentityRequest(_Request, frozen=True, kw_only=True, tag="identity"):
    """Fresh entropy, time and names, before anything of the user's runs."""

    time_ns: int
    entropy: bytes
    hostname: str
    files: list[IdentityFile] = []


class PtySize(msgspec.Struct, frozen=True, kw_only=True):
    """The size of a terminal, in characters."""

    rows: int
    cols: int


class ExecBounds(msgspec.Struct, frozen=True, kw_only=True):
    """What an exec's cgroup may use: bytes, processes, a weight, microseconds of processor time in each 100 ms, and
    bytes that it may read from the root's disk, and write to it, in each second.
    """

    memory: int | None = None
    processes: int | None = None
    cpu_weight: int | None = None
    cpu_us: int | None = None
    disk_read: int | None = None
    disk_write: int | None = None


class ExecRequest(_Request, frozen=True, kw_only=True, tag="exec"):
    """Start a program; `merge` sends standard error down the pipe of standard output, `pty` gives it a terminal."""

    argv: list[bytes]
    env: list[bytes]
    cwd: bytes
    uid: int = 0
    gid: int = 0
    groups: list[int] = []
    merge: bool = False
    pty: PtySize | None = None
    limits: ExecBounds | None = None


class ReadRequest(_Request, frozen=True, kw_only=True, tag="read"):
    path: bytes
    offset: int = 0
    length: int = -1
    follow: bool = True


class WriteRequest(_Request, frozen=True, kw_only=True, tag="write"):
    path: bytes
    mode: int = -1
    uid: int = 0
    gid: int = 0
    parents: bool = False
    mtime_ns: int = -1


class StatRequest(_Request, frozen=True, kw_only=True, tag="stat"):
    path: bytes
    follow: bool = True


class ChmodRequest(_Request, frozen=True, kw_only=True, tag="chmod"):
    path: bytes
    mode: int


class SymlinkRequest(_Request, frozen=True, kw_only=True, tag="symlink"):
    path: bytes
    target: bytes
    uid: int = 0
    gid: int = 0


class ReadlinkRequest(_Request, frozen=True, kw_only=True, tag="readlink"):
    path: bytes


class ListRequest(_Request, frozen=True, kw_only=True, tag="list"):
    """With `layer` the directory is one of overlayfs' upper layer, and each entry says what it stands for."""

    path: bytes
    layer: bool = False


class MkdirRequest(_Request, frozen=True, kw_only=True, tag="mkdir"):
    path: bytes
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    parents: bool = False


class RenameRequest(_Request, frozen=True, kw_only=True, tag="rename"):
    path: bytes
    to: bytes
    replace: bool = True


class RemoveRequest(_Request, frozen=True, kw_only=True, tag="remove"):
    path: bytes
    recursive: bool = False
    missing_ok: bool = False


class WatchRequest(_Request, frozen=True, kw_only=True, tag="watch"):
    """Tell what changes in `path`, with `recursive` in all below it, until the stream is reset (wire/changes.py)."""

    path: bytes
    recursive: bool = False


class GrowRequest(_Request, frozen=True, kw_only=True, tag="grow"):
    """Let the root file system take all of a disk that has just become `size` bytes large."""

    size: int


class MountRequest(_Request, frozen=True, kw_only=True, tag="mount"):
    """With `layer`, a directory of the guest's disk, changes are kept there by overlayfs. With `file`, the root is a
    regular file, and so is what it is mounted on.
    """

    id: int
    path: bytes
    readonly: bool = False
    file: bool = False
    layer: bytes | None = None


class UnmountRequest(_Request, frozen=True, kw_only=True, tag="unmount"):
    id: int


class RenewRequest(_Request, frozen=True, kw_only=True, tag="renew"):
    """Drop what the layer of a mount holds."""

    id: int


class SettleRequest(_Request, frozen=True, kw_only=True, tag="settle"):
    """Copy all below a path into the layer: what was renamed needs the host's directory of the old name no more."""

    path: bytes


class SyncRequest(_Request, frozen=True, kw_only=True, tag="sync"):
    """Write what the guest holds back to its disk."""


class PoweroffRequest(_Request, frozen=True, kw_only=True, tag="poweroff"):
    """Sync and turn the machine off."""


Request = (
    PingRequest
    | IdentityRequest
    | ExecRequest
    | ReadRequest
    | WriteRequest
    | StatRequest
    | ChmodRequest
    | SymlinkRequest
    | ReadlinkRequest
    | ListRequest
    | MkdirRequest
    | RenameRequest
    | RemoveRequest
    | WatchRequest
    | GrowRequest
    | MountRequest
    | UnmountRequest
    | RenewRequest
    | SettleRequest
    | SyncRequest
    | PoweroffRequest
)


class SignalRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The payload of SIGNAL."""

    signal: int
    scope: Literal["group", "all"] = "group"


class ResizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The payload of SIGNAL that changes the size of an exec's terminal."""

    rows: int
    cols: int
    scope: Literal["resize"] = "resize"


# What the guest answers.


class _Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From the guest: not trusted, only well-formed."""


class Hello(_Answer, frozen=True, kw_only=True):
    version: str
    protocol: int
    arch: str
    kernel: str


class Failure(_Answer, frozen=True, kw_only=True):
    """The answer to an operation that failed: a Linux errno and the system call or step."""

    errno: _Errno
    call: _CallName


class Done(_Answer, frozen=True, kw_only=True):
    """The answer to an operation that has nothing to say."""


class Started(_Answer, frozen=True, kw_only=True):
    pid: Annotated[int, Meta(ge=1)]


class ReadStarted(_Answer, frozen=True, kw_only=True):
    size: _Count
    mode: _Mode
    mtime_ns: int


class Written(_Answer, frozen=True, kw_only=True):
    size: _Count


class FileStat(_Answer, frozen=True, kw_only=True):
    """What a guest path is. `mode` holds the low 12 bits; times are nanoseconds since 1970 UTC; sizes bytes."""

    type: FileType
    mode: _Mode
    size: _Count
    uid: _Owner
    gid: _Owner
    nlink: _Count
    ino: int
    mtime_ns: int
    target: bytes | None = None


class LinkTarget(_Answer, frozen=True, kw_only=True):
    """What a symbolic link holds."""

    target: bytes


class DirEntry(_Answer, frozen=True, kw_only=True):
    """One entry of a guest directory. `name` is bytes, as Linux names are, and one component: who joins it to a path
    of the host stays in that directory.
    """

    name: bytes
    type: FileType
    mode: _Mode
    size: _Count
    mtime_ns: int
    mark: Mark | None = None

    def __post_init__(self) -> None:
        if self.name in (b"", b".", b"..") or b"/" in self.name or b"\0" in self.name:
            raise ValueError("a name is not one path component")


class UsageReport(_Answer, frozen=True, kw_only=True):
    """What an exec's cgroup has used until its main process ended."""

    user_us: _Total
    system_us: _Total
    memory_peak: _Total
    processes_peak: _Total
    read_bytes: _Total
    written_bytes: _Total
    oom_kills: _Total


class Exited(_Answer, frozen=True, kw_only=True):
    """The payload of EXIT: exactly one of `code` and `signal` is set."""

    code: Annotated[int, Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, Meta(ge=1, le=127)] | None = None
    usage: UsageReport | None = None

    def __post_init__(self) -> None:
        if (self.code is None) is (self.signal is None):
            raise ValueError("a process ends by a code or by a signal")


_encoder = msgspec.msgpack.Encoder()
_A = TypeVar("_A", bound=_Answer)


class AnswerError(Exception):
    """Raised when an answer is not the map that was due."""


def encode(message: Request | SignalRequest | ResizeRequest) -> bytes:
    """Return `message` as the msgpack map of the protocol."""
    return _encoder.encode(message)


def decode(payload: bytes | memoryview, kind: type[_A]) -> _A | Failure:
    """Return the answer as `kind`, or as the Failure it turned out to be. Raises AnswerError otherwise."""
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if kind is not Failure:
            try:
                return msgspec.msgpack.decode(payload, type=Failure)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                pass
        raise AnswerError(f"expected {kind.__name__}: {_told(error)}") from None


def _told(error: Exception) -> str:
    """The error's text, which may quote the guest: cut, and with control characters escaped."""
    text = str(error)[:_MAX_TOLD]
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
