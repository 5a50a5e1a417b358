"""The agent's end of the file system port, in the hands of a test."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.waiting import PATIENCE_S

from taskvm.fs.server import FsServer
from taskvm.wire.frames import Frame, FrameDecoder, FrameType, encode_frame

INIT = struct.pack("<IIII", 7, 37, 131072, 0xFFFF_FFFF) + bytes(48)


@dataclass
class Guest:
    """The agent's end of the port."""

    sock: socket.socket
    server: FsServer
    failures: list[Exception]
    failed: threading.Event
    decoder: FrameDecoder = field(default_factory=FrameDecoder)
    frames: list[Frame] = field(default_factory=list)

    def send(self, opcode: int, node: int, body: bytes = b"", *, mount: int = 1) -> None:
        request = struct.pack("<IIQQIIIHH", 40 + len(body), opcode, 8, node, 0, 0, 0, 0, 0) + body
        self.sock.sendall(encode_frame(FrameType.FUSE, 0, mount, request))

    def receive(self) -> Frame:
        while not self.frames:
            data = self.sock.recv(1 << 20)
            if not data:
                raise ConnectionError("closed")
            self.frames += self.decoder.feed(data)
        return self.frames.pop(0)

    def ask(self, opcode: int, node: int, body: bytes = b"", *, mount: int = 1) -> int:
        """Return the errno of the answer."""
        self.send(opcode, node, body, mount=mount)
        frame = self.receive()
        assert (frame.type, frame.stream) == (FrameType.FUSE, mount)
        return -int(struct.unpack_from("<IiQ", frame.payload)[1])


@contextmanager
def port_end() -> Iterator[Guest]:
    """A server, and the other end of its port."""
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE_S)
    failures: list[Exception] = []
    failed = threading.Event()

    def on_failure(error: Exception) -> None:
        failures.append(error)
        failed.set()

    server = FsServer(theirs, on_failure=on_failure)
    yield Guest(ours, server, failures, failed)
    server.close()
    ours.close()
