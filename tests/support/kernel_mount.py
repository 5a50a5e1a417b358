"""A FUSE mount of this host's kernel, pumped to an FsServer as the guest agent does it. Needs root and /dev/fuse."""

from __future__ import annotations

import os
import queue
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support import fuse_pump
from tests.support.mount_namespace import libc, make_mounts_private
from tests.support.waiting import PATIENCE_S, wait_until

from taskvm.fs.provider import Provider
from taskvm.fs.server import FsServer
from taskvm.wire.frames import Frame, FrameDecoder, FrameType, encode_header
from taskvm.wire.fuse import Opcode

MNT_DETACH = 2
MOUNT_ID = 7

_NAMES = {opcode.value: opcode.name for opcode in Opcode} | {39: "IOCTL"}


def need_private_mounts() -> None:
    """Skip where the tests have no mounts of their own, which tests/conftest.py gives them."""
    if reason := make_mounts_private():
        pytest.skip(reason)


class KernelMount:
    """`requests` counts what the kernel asked, `messages` are what it did not ask for, `refused` what it takes not.

    The mount ends with this process, however that ends: fuse_pump.py holds it, and is killed when the thread ends that
    started it, whatever the others wait for.
    """

    def __init__(self, provider: Provider, path: Path) -> None:
        need_private_mounts()
        self.path = path
        self.requests: Counter[str] = Counter()
        self.messages: list[bytes] = []
        self.refused: list[tuple[int, bytes]] = []
        self.failures: list[Exception] = []
        self._taken = 0  # of the messages
        self._sending = threading.Lock()  # held while at rest
        self._threads: list[threading.Thread] = []
        self._pump, theirs = socket.socketpair()
        self._connect()
        self.server.add_mount(MOUNT_ID, provider)
        self._mount(theirs, file=provider.is_file)
        self._start(self._up)

    @property
    def told(self) -> int:
        """How many messages the kernel did not ask for."""
        return len(self.messages)

    def close(self) -> None:
        """Unmount."""
        libc.umount2(os.fsencode(self.path), MNT_DETACH)
        self.server.close()
        with suppress(OSError):  # the kernel was faster
            self._pump.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        self._sock.close()
        self._pump.close()

    def settle(self) -> None:
        """Return when the kernel has taken all that it was not asked for."""
        wait_until(lambda: self._taken == len(self.messages))

    def save(self) -> bytes:
        """Bring everything to rest, end the server, and return the mount's state."""
        self.server.quiesce()
        state = self.server.export_mounts()[MOUNT_ID]
        self.server.close()
        self._downwards.join(PATIENCE_S)
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
        self._downwards = self._start(self._down)

    def _mount(self, theirs: socket.socket, *, file: bool) -> None:
        if file:
            self.path.touch()
        else:
            self.path.mkdir(exist_ok=True)
        said: queue.SimpleQueue[str] = queue.SimpleQueue()
        mode = stat.S_IFREG if file else stat.S_IFDIR
        self._start(lambda: self._hold(theirs, said, f"{mode:o}"))
        outcome = said.get(timeout=PATIENCE_S)
        if outcome != "mounted":
            pytest.skip(f"cannot mount FUSE: {outcome}: NOT run")

    def _hold(self, theirs: socket.socket, said: queue.SimpleQueue[str], mode: str) -> None:
        """Run the pump for as long as it lives."""
        arguments = [str(self.path), mode, str(os.getpid())]
        program = [sys.executable, "-I", "-S", fuse_pump.__file__, *arguments]
        pipe = subprocess.PIPE
        with subprocess.Popen(program, stdin=theirs, stdout=pipe, text=True) as pump:
            theirs.close()
            assert pump.stdout is not None
            said.put(pump.stdout.readline().strip())
            for line in pump.stdout:
                number, _, message = line.strip().partition(" ")
                if number == "told":
                    self._taken += 1
                else:
                    self.refused.append((int(number), bytes.fromhex(message)))

    def _start(self, run: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _up(self) -> None:
        with self._pump.makefile("rb") as messages:
            while head := messages.read(8):
                length, opcode = struct.unpack("<II", head)
                message = head + messages.read(length - 8)
                self.requests[_NAMES.get(opcode, str(opcode))] += 1
                try:
                    with self._sending:
                        self._sock.sendmsg([encode_header(FrameType.FUSE, 0, MOUNT_ID, length)])
                        self._sock.sendall(message)
                except OSError:
                    return

    def _down(self) -> None:
        decoder, sock = FrameDecoder(), self._sock
        with suppress(OSError):  # the server ended before it had read what the kernel asked last
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
        else:
            if not struct.unpack_from("<8xQ", frame.payload)[0]:
                self.messages.append(bytes(frame.payload))
            with suppress(OSError):  # unmounted
                self._pump.sendall(frame.payload)
