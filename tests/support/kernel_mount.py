"""A FUSE mount of this host's kernel, pumped to an FsServer as the guest agent does it. Needs root and /dev/fuse."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import socket
import stat
import struct
import threading
from collections import Counter
from pathlib import Path

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm.fs.provider import Provider
from taskvm.fs.server import FsServer
from taskvm.wire.frames import Frame, FrameDecoder, FrameType, encode_header
from taskvm.wire.fuse import Opcode

MS_NOSUID, MS_NODEV, MS_PRIVATE, MS_REC = 2, 4, 1 << 18, 1 << 14
MNT_DETACH = 2
CLONE_NEWNS = 0x20000
MOUNT_ID = 7

libc = ctypes.CDLL(None, use_errno=True)
_NAMES = {opcode.value: opcode.name for opcode in Opcode} | {39: "IOCTL"}
_privacy: list[bool] = []


def need_private_mounts() -> None:
    """Let mounts be seen by this process and its children only, and end with it; skip where that cannot be."""
    if _privacy:
        return
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("mounting FUSE needs root and /dev/fuse: the kernel tests did NOT run")
    if libc.unshare(CLONE_NEWNS) or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
        pytest.skip(f"no private mount namespace ({os.strerror(ctypes.get_errno())}): NOT run")
    _privacy.append(True)


class KernelMount:
    """`requests` counts what the kernel asked, `messages` are what it did not ask for, `refused` what it takes not."""

    def __init__(self, provider: Provider, path: Path) -> None:
        need_private_mounts()
        self.path = path
        self.requests: Counter[str] = Counter()
        self.messages: list[bytes] = []
        self.refused: list[tuple[int, bytes]] = []
        self.failures: list[Exception] = []
        self._sending = threading.Lock()  # held while at rest
        self._notifications: queue.Queue[bytes | None] = queue.Queue()
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._threads: list[threading.Thread] = []
        self._connect()
        self.server.add_mount(MOUNT_ID, provider)
        self._mount(file=provider.is_file)
        self._start(self._up)
        self._start(self._notify)

    @property
    def told(self) -> int:
        """How many messages the kernel did not ask for."""
        return len(self.messages)

    def close(self) -> None:
        """Unmount."""
        libc.umount2(os.fsencode(self.path), MNT_DETACH)
        self.server.close()
        self._notifications.put(None)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        self._sock.close()
        os.close(self._fuse)

    def settle(self) -> None:
        """Wait until the kernel has taken what it was told, which comes before the answers to its requests."""
        self._notifications.join()

    def save(self) -> bytes:
        """Bring everything to rest, end the server, and return the mount's state."""
        self.server.quiesce()
        state = self.server.export_mounts()[MOUNT_ID]
        self.server.close()
        self._sock.close()
        return state

    def take_up(self, provider: Provider, state: bytes) -> None:
        """Go on with another server."""
        self._connect()
        self.server.add_mount(MOUNT_ID, provider, state)
        self.server.resume()

    def _connect(self) -> None:
        self._sock, theirs = socket.socketpair()
        self.server = FsServer(theirs, on_failure=self.failures.append)
        self._start(self._down)

    def _mount(self, *, file: bool) -> None:
        if file:
            self.path.touch()
        else:
            self.path.mkdir(exist_ok=True)
        rootmode = stat.S_IFREG if file else stat.S_IFDIR
        options = f"fd={self._fuse},rootmode={rootmode:o},user_id=0,group_id=0,allow_other,default_permissions"
        flags = MS_NOSUID | MS_NODEV
        if libc.mount(b"taskvm", os.fsencode(self.path), b"fuse", flags, options.encode()):
            pytest.skip(f"cannot mount FUSE: {os.strerror(ctypes.get_errno())}: NOT run")

    def _start(self, run: object) -> None:
        assert callable(run)
        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def _up(self) -> None:
        buffer = bytearray((1 << 20) + 65536)
        while True:
            try:
                count = os.readv(self._fuse, [buffer])
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue
                return  # ENODEV: unmounted
            opcode = struct.unpack_from("<4xI", buffer)[0]
            self.requests[_NAMES.get(opcode, str(opcode))] += 1
            try:
                with self._sending:
                    self._sock.sendmsg([encode_header(FrameType.FUSE, 0, MOUNT_ID, count)])
                    self._sock.sendall(memoryview(buffer)[:count])
            except OSError:
                return

    def _down(self) -> None:
        decoder, sock = FrameDecoder(), self._sock
        while data := sock.recv(1 << 18):
            for frame in decoder.feed(data):
                self._take(frame)

    def _take(self, frame: Frame) -> None:
        if frame.type is FrameType.QUIESCE:
            self._sending.acquire()
            self._sock.sendall(encode_header(FrameType.QUIESCED, 0, 0, 0))
        elif frame.type is FrameType.RESUME:
            if self._sending.locked():
                self._sending.release()
        elif not struct.unpack_from("<8xQ", frame.payload)[0]:
            self.messages.append(bytes(frame.payload))
            self._notifications.put(bytes(frame.payload))
        else:
            self._write(frame.payload)

    def _notify(self) -> None:
        while (message := self._notifications.get()) is not None:
            self._write(message)
            self._notifications.task_done()

    def _write(self, message: bytes) -> None:
        try:
            os.write(self._fuse, message)
        except OSError as error:
            if error.errno != errno.ENOENT:
                self.refused.append((error.errno or 0, bytes(message[:64])))
