"""What a watch of the guest's files tells: length-prefixed msgpack maps in a stream (docs/protocol-control.md).

Pure: bytes in, changes out. The guest is not trusted; a path that leads out of the watched one is refused.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

ChangeKind = Literal["created", "modified", "written", "attributes", "deleted", "moved", "overflow"]
# Two paths of PATH_MAX and the map around them.
MAX_RECORD = 2 * 4096 + 128
_LENGTH = struct.Struct("<I")
_Path = Annotated[bytes, Meta(max_length=4095)]


class ChangeError(Exception):
    """Raised when what came is no change. Its text holds nothing of the guest's."""


class ChangeRecord(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"old": "from"}
):
    """One change. `path`, and `old` of a move, are relative to what is watched, which is the empty path."""

    kind: ChangeKind
    path: _Path
    dir: Annotated[int, Meta(ge=0, le=1)]
    old: _Path | None = None

    def __post_init__(self) -> None:
        if (self.old is not None) is not (self.kind == "moved"):
            raise ValueError("a move, and nothing else, has an old path")
        for path in (self.path, self.old or b""):
            if path and not _stays_below(path):
                raise ValueError("a path that does not stay below the watched one")


_decoder = msgspec.msgpack.Decoder(ChangeRecord)


class ChangeDecoder:
    """Cuts the stream into changes. Holds at most one record of MAX_RECORD bytes."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[ChangeRecord]:
        """Return the changes that `data` completes. Raises ChangeError."""
        self._rest += data
        changes = []
        start = 0
        while len(self._rest) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._rest, start)
            if size > MAX_RECORD:
                raise ChangeError(f"a record of {size} bytes")
            end = start + _LENGTH.size + size
            if len(self._rest) < end:
                break
            changes.append(_decode(bytes(self._rest[start + _LENGTH.size : end])))
            start = end
        del self._rest[:start]
        return changes


def _decode(record: bytes) -> ChangeRecord:
    try:
        return _decoder.decode(record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ChangeError("a record that is no change") from None


def _stays_below(path: bytes) -> bool:
    return b"\0" not in path and not {b"", b".", b".."} & set(path.split(b"/"))
