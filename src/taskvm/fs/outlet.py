"""Bytes on their way out of a socket: sent whole from many buffers, and counted until the other side has them."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections.abc import Sequence

MAX_IOVECS = 512  # IOV_MAX is 1024; each answer adds at most two


def send_all(sock: socket.socket, buffers: Sequence[bytes]) -> None:
    """Send all bytes of all `buffers` (sendmsg(2) may take a part of them). Raises OSError when the socket ends."""
    if len(buffers) == 1:  # nearly always; cheaper than sendmsg
        sock.sendall(buffers[0])
        return
    remaining: list[bytes | memoryview] = list(buffers)
    while remaining:
        sent = sock.sendmsg(remaining[:MAX_IOVECS])
        done = 0
        while done < len(remaining) and sent >= len(remaining[done]):
            sent -= len(remaining[done])
            done += 1
        del remaining[:done]
        if sent:
            remaining[0] = memoryview(remaining[0])[sent:]


def unread(sock: socket.socket) -> int:
    """Return how many bytes the other side has not taken yet (SIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))[0])
