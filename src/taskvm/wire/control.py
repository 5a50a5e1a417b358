"""The maps of the control port: what the host asks (`*Request`) and what the guest answers, as closed msgpack schemas.

Requests are built by us and encoded; answers come from an untrusted guest and are decoded with every field typed,
bounded by the frame, and unknown keys refused (docs/protocol-control.md).
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

FileType = Literal["file", "dir", "symlink", "fifo", "socket", "block", "char"]


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


class ExecRequest(_Request, frozen=True, kw_only=True, tag="exec"):
    """Start a program; `merge` sends standard error down the pipe of standard output."""

    argv: list[bytes]
    env: list[bytes]
    cwd: bytes
    uid: int = 0
    gid: int = 0
    groups: list[int] = []
    merge: bool = False


class ReadRequest(_Request, frozen=True, kw_only=True, tag="read"):
    path: bytes
    offset: int = 0
    length: int = -1


class WriteRequest(_Request, frozen=True, kw_only=True, tag="write"):
    path: bytes
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    parents: bool = False


class StatRequest(_Request, frozen=True, kw_only=True, tag="stat"):
    path: bytes
    follow: bool = True


class ListRequest(_Request, frozen=True, kw_only=True, tag="list"):
    path: bytes


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


class MountRequest(_Request, frozen=True, kw_only=True, tag="mount"):
    id: int
    path: bytes
    readonly: bool = False


class UnmountRequest(_Request, frozen=True, kw_only=True, tag="unmount"):
    id: int


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
    | ListRequest
    | MkdirRequest
    | RenameRequest
    | RemoveRequest
    | MountRequest
    | UnmountRequest
    | SyncRequest
    | PoweroffRequest
)


class SignalRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The payload of SIGNAL."""

    signal: int
    scope: Literal["group", "all"] = "group"


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

    errno: int
    call: str


class Done(_Answer, frozen=True, kw_only=True):
    """The answer to an operation that has nothing to say."""


class Started(_Answer, frozen=True, kw_only=True):
    pid: int


class ReadStarted(_Answer, frozen=True, kw_only=True):
    size: int
    mode: int
    mtime_ns: int


class Written(_Answer, frozen=True, kw_only=True):
    size: int


class FileStat(_Answer, frozen=True, kw_only=True):
    """What a guest path is. `mode` holds the low 12 bits; times are nanoseconds since 1970 UTC; sizes bytes."""

    type: FileType
    mode: int
    size: int
    uid: int
    gid: int
    nlink: int
    ino: int
    mtime_ns: int
    target: bytes | None = None


class DirEntry(_Answer, frozen=True, kw_only=True):
    """One entry of a guest directory. `name` is bytes: Linux names are."""

    name: bytes
    type: FileType
    mode: int
    size: int
    mtime_ns: int


class Exited(_Answer, frozen=True, kw_only=True):
    """The payload of EXIT: exactly one of the two is set."""

    code: int | None = None
    signal: int | None = None


_encoder = msgspec.msgpack.Encoder()
_A = TypeVar("_A", bound=_Answer)


class AnswerError(Exception):
    """Raised when an answer is not the map that was due."""


def encode(message: Request | SignalRequest) -> bytes:
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
        raise AnswerError(f"expected {kind.__name__}: {error}") from None
