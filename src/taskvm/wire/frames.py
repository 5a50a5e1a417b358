"""The frame codec of the three ports between host and guest (docs/protocol-control.md, guest/limits.h).

A frame is a 12-byte little-endian header (u32 length, u8 type, u8 channel, u16 reserved, u32 stream) and `length`
bytes. The decoder is fed whatever arrived and returns the frames that are complete.

Rule 1: a length is checked before anything is allocated for it.
Rule 2: whatever bytes come, the only exception is FrameError.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

PROTOCOL_VERSION = 1
HEADER_SIZE = 12
MAX_PAYLOAD = 1024 * 1024 + 64 * 1024  # one FUSE message of 1 MiB and its headers
MAX_MAP = 1024 * 1024
MAX_DATA = 64 * 1024
MAX_DATAGRAM = 4096
INITIAL_CREDIT = 256 * 1024
GUEST_STREAM_BIT = 0x8000_0000

PORT_CONTROL = "taskvm.control"
PORT_FS = "taskvm.fs"
PORT_NET = "taskvm.net"

_HEADER = struct.Struct("<IBBHI")


class FrameType(enum.IntEnum):
    """What a frame is; the table in docs/protocol-control.md says who may send it and what it means."""

    OPEN = 1
    REPLY = 2
    DATA = 3
    CREDIT = 4
    END = 5
    RESET = 6
    SIGNAL = 7
    EXIT = 8
    HELLO = 9
    DATAGRAM = 10
    QUIESCE = 11
    QUIESCED = 12
    RESUME = 13
    FUSE = 14


# The least and the most payload a type may carry: (minimum, maximum) bytes.
_PAYLOAD_BOUNDS: dict[int, tuple[int, int]] = {
    FrameType.OPEN: (1, MAX_MAP),
    FrameType.REPLY: (1, MAX_MAP),
    FrameType.DATA: (1, MAX_DATA),
    FrameType.CREDIT: (4, 4),
    FrameType.END: (0, 0),
    FrameType.RESET: (4, 4),
    FrameType.SIGNAL: (1, MAX_MAP),
    FrameType.EXIT: (1, MAX_MAP),
    FrameType.HELLO: (1, MAX_MAP),
    FrameType.DATAGRAM: (1, MAX_DATAGRAM),
    FrameType.QUIESCE: (0, 0),
    FrameType.QUIESCED: (0, 0),
    FrameType.RESUME: (0, 0),
    FrameType.FUSE: (16, MAX_PAYLOAD),
}
_TYPES = {int(member): member for member in FrameType}


class FrameError(Exception):
    """Raised by the decoder when the bytes are not frames. The connection cannot be read on."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. `payload` is a view into the decoder's own copy and stays valid."""

    type: FrameType
    channel: int
    stream: int
    payload: bytes | memoryview = b""


def encode_header(kind: FrameType, channel: int, stream: int, length: int) -> bytes:
    """Return the 12-byte header of a frame whose payload has `length` bytes."""
    return _HEADER.pack(length, kind, channel, 0, stream)


def encode_frame(
    kind: FrameType, channel: int, stream: int, payload: bytes | memoryview = b""
) -> bytes:
    """Return a whole frame: header and payload in one bytes object."""
    return _HEADER.pack(len(payload), kind, channel, 0, stream) + payload


def encode_u32(value: int) -> bytes:
    """Return the payload of CREDIT and RESET."""
    return value.to_bytes(4, "little")


def decode_u32(payload: bytes | memoryview) -> int:
    """Return the number in the payload of CREDIT and RESET (whose length the decoder has checked)."""
    return int.from_bytes(payload, "little")


class FrameDecoder:
    """Cut a byte stream into frames; holds at most one incomplete frame.

    `max_payload` narrows the limit of the protocol for a port that needs less.
    """

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self._max_payload = max_payload
        self._pending = bytearray()
        self._wanted = HEADER_SIZE

    def feed(self, data: bytes | bytearray | memoryview, limit: int | None = None) -> list[Frame]:
        """Return the frames that `data` completes, oldest first. Raises FrameError on a malformed one.

        With `limit` at most so many: as many as that means there may be more, for which `feed(b"", limit)` asks.
        """
        if self._pending:
            self._pending += data
            if len(self._pending) < self._wanted:
                return []
            buffer = memoryview(bytes(self._pending))
        else:
            buffer = memoryview(bytes(data))
        frames: list[Frame] = []
        position, total = 0, len(buffer)
        self._wanted = HEADER_SIZE
        while total - position >= HEADER_SIZE and len(frames) != limit:
            length, kind, channel, reserved, stream = _HEADER.unpack_from(buffer, position)
            frame_type = self._check(length, kind, reserved)
            end = position + HEADER_SIZE + length
            if end > total:
                self._wanted = HEADER_SIZE + length
                break
            frames.append(Frame(frame_type, channel, stream, buffer[position + HEADER_SIZE : end]))
            position = end
        self._pending = bytearray(buffer[position:])
        return frames

    def _check(self, length: int, kind: int, reserved: int) -> FrameType:
        frame_type = _TYPES.get(kind)
        if frame_type is None:
            raise FrameError(f"frame type {kind} does not exist")
        least, most = _PAYLOAD_BOUNDS[frame_type]
        if not least <= length <= min(most, self._max_payload):
            raise FrameError(f"a {frame_type.name} frame of {length} bytes is not allowed")
        if reserved:
            raise FrameError(f"reserved field is {reserved}, not 0")
        return frame_type
