"""A guest's kernel that is hostile: it sends the file server whatever it likes, and reads what comes back."""

from __future__ import annotations

import errno
import socket
import struct
import threading

from tests.support.waiting import PATIENCE_S

from taskvm.fs.provider import Provider
from taskvm.fs.server import FsServer
from taskvm.wire.frames import FrameDecoder, FrameType, encode_header
from taskvm.wire.fuse import Opcode

MOUNT = 3
ROOT = 1
O_CREAT, O_WRONLY, O_EXCL, O_TRUNC = 0o100, 1, 0o200, 0o1000


class HostileKernel:
    """Sends any request and returns (errno, body), or raises when the port was closed on it."""

    def __init__(self, provider: Provider) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(PATIENCE_S)
        self.failed = threading.Event()
        self.failures: list[Exception] = []
        self.server = FsServer(theirs, on_failure=self._failure)
        self.server.add_mount(MOUNT, provider)
        self._decoder = FrameDecoder()
        self._unique = 0
        self.ask(Opcode.INIT, 0, struct.pack("<IIII", 7, 38, 131072, 0xFFFF_FFFF) + bytes(48))

    def _failure(self, error: Exception) -> None:
        self.failures.append(error)
        self.failed.set()

    def message(self, opcode: int, node: int, body: bytes) -> bytes:
        self._unique += 2
        return (
            struct.pack("<IIQQIIIHH", 40 + len(body), opcode, self._unique, node, 0, 0, 1, 0, 0)
            + body
        )

    def send(self, message: bytes) -> None:
        self.sock.sendall(encode_header(FrameType.FUSE, 0, MOUNT, len(message)) + message)

    def ask(self, opcode: int, node: int, body: bytes = b"") -> tuple[int, bytes]:
        self.send(self.message(opcode, node, body))
        while data := self.sock.recv(1 << 18):
            for frame in self._decoder.feed(data):
                length, error, unique = struct.unpack_from("<IiQ", frame.payload)
                if not unique:
                    continue  # a notification: this kernel remembers nothing
                assert (length, unique) == (len(frame.payload), self._unique)
                return -error, bytes(frame.payload[16:])
        raise ConnectionError("the server closed the port")

    def lookup(self, node: int, name: bytes) -> int:
        """Return the node, or minus the errno."""
        error, body = self.ask(Opcode.LOOKUP, node, name + b"\0")
        return -error if error else int(struct.unpack_from("<Q", body)[0]) or -errno.ENOENT

    def read(self, node: int) -> tuple[int, bytes]:
        return self.ask(Opcode.READ, node, struct.pack("<QQIIQII", 0, 0, 4096, 0, 0, 0, 0))

    def write(self, node: int, data: bytes, offset: int = 0) -> tuple[int, bytes]:
        head = struct.pack("<QQIIQII", 0, offset, len(data), 0, 0, O_WRONLY, 0)
        return self.ask(Opcode.WRITE, node, head + data)

    def create(self, node: int, name: bytes, mode: int, flags: int = 0) -> tuple[int, bytes]:
        body = struct.pack("<IIII", flags | O_CREAT | O_WRONLY, mode, 0, 0) + name + b"\0"
        return self.ask(Opcode.CREATE, node, body)

    def setattr(self, node: int, valid: int, **fields: int) -> tuple[int, bytes]:
        body = struct.pack(
            "<IIQQQqqqIIIIIIII",
            *(valid, 0, 0, fields.get("size", 0), 0, 0, 0, 0, 0, 0, 0),
            *(fields.get("mode", 0), 0, fields.get("uid", 0), fields.get("gid", 0), 0),
        )
        return self.ask(Opcode.SETATTR, node, body)

    def close(self) -> None:
        self.server.close()
        self.sock.close()
