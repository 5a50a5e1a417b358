"""Run as a program: mounts FUSE on a path and copies messages between /dev/fuse and the socket on descriptor 0.

A process of its own, because the last descriptor of /dev/fuse has to be closed when the tests are killed: their own
process would keep it open for ever, waiting for an answer of a file system that it serves itself. It ends with the
thread that started it. What the kernel was told unasked is written by a thread of its own, as in the guest's agent,
because it may be held back until something else is answered. On the output is a line for each of these, and for each
refusal.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import signal
import socket
import struct
import sys
import threading

MS_NOSUID, MS_NODEV = 2, 4
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
_told: queue.SimpleQueue[bytes] = queue.SimpleQueue()


def main() -> None:
    """Mount, say so, and copy until the mount or the socket ends."""
    path, mode, parent = sys.argv[1:]
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode={mode},user_id=0,group_id=0,allow_other,default_permissions"
    flags = MS_NOSUID | MS_NODEV
    failed = _libc.mount(b"taskvm", os.fsencode(path), b"fuse", flags, options.encode())
    outcome = os.strerror(ctypes.get_errno()) if failed else "mounted"
    os.write(1, f"{outcome}\n".encode())
    if failed:
        return
    sock = socket.socket(fileno=0)
    for run in (_up, _notify):
        threading.Thread(target=run, args=(fuse, sock), daemon=True).start()
    _down(fuse, sock)


def _up(fuse: int, sock: socket.socket) -> None:
    buffer = bytearray((1 << 20) + 65536)
    while True:
        try:
            count = os.readv(fuse, [buffer])
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                continue
            break  # ENODEV: unmounted
        sock.sendall(memoryview(buffer)[:count])
    sock.shutdown(socket.SHUT_RDWR)


def _down(fuse: int, sock: socket.socket) -> None:
    with sock.makefile("rb") as messages:
        while head := messages.read(16):
            length, _error, unique = struct.unpack("<IiQ", head)
            message = head + messages.read(length - 16)
            if unique:
                _write(fuse, message)
            else:
                _told.put(message)


def _notify(fuse: int, _sock: socket.socket) -> None:
    while True:
        _write(fuse, _told.get())
        os.write(1, b"told\n")


def _write(fuse: int, message: bytes) -> None:
    try:
        os.write(fuse, message)
    except OSError as error:
        if error.errno != errno.ENOENT:
            os.write(1, f"{error.errno} {message[:64].hex()}\n".encode())


if __name__ == "__main__":
    main()
