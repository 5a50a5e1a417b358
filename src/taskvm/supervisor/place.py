"""Where the user's supervisor is found: its directory, its socket, and the lock that says that it lives.

Rule 1: the directory belongs to this user and nobody else may enter it; the peer's user is asked of the kernel besides.
Rule 2: whoever has the lock is the supervisor, or starts it. The kernel drops the lock when its holder ends in any way,
        so a socket of a supervisor that was killed is nobody's, and the next one replaces it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from taskvm.errors import HostError
from taskvm.paths import cache_path, private_dir

RUNTIME_VARIABLE = "TASKVM_RUNTIME"
BACKLOG = 64
_SOCKET = "socket"
_LOCK = "lock"
_UCRED = struct.Struct("3i")  # struct ucred in linux/socket.h: pid, uid, gid


@dataclass(frozen=True, slots=True)
class Place:
    """The directory of one supervisor."""

    directory: Path

    @classmethod
    def of_user(cls) -> Place:
        """Return the place of this user's supervisor, made 0700: `TASKVM_RUNTIME`, else `supervisor` in the cache.

        Not XDG_RUNTIME_DIR: that is removed at logout, and what is supervised here outlives a login.
        Raises HostError when another user owns it or may enter it.
        """
        chosen = os.environ.get(RUNTIME_VARIABLE)
        directory = private_dir(Path(chosen) if chosen else cache_path() / "supervisor")
        if directory.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise HostError(
                f"use the directory {directory}",
                "others may enter it",
                f"chmod it to 700, or set {RUNTIME_VARIABLE} to a directory that is not there yet",
            )
        return cls(directory)

    @property
    def log(self) -> Path:
        """The file that the supervisor writes what it does to."""
        return self.directory / "log"

    def connect(self) -> socket.socket | None:
        """Return a connection to the supervisor, or None where none listens. Raises HostError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)  # connect(2) to a Unix socket is done at once or EAGAIN
        try:
            with self._short_name() as name:
                sock.connect(name)
            if peer_uid(sock) != os.geteuid():
                raise HostError(
                    f"connect to the supervisor in {self.directory}",
                    f"it runs as another user ({peer_uid(sock)})",
                    f"Set {RUNTIME_VARIABLE} to a directory of your own",
                )
        except (FileNotFoundError, ConnectionError, BlockingIOError):
            sock.close()  # nobody there, or too many at once
            return None
        except OSError as error:
            sock.close()
            raise self._error("connect to the supervisor", error) from error
        except BaseException:
            sock.close()
            raise
        return sock

    def lock(self) -> int | None:
        """Return a descriptor that holds the lock, or None when somebody else has it."""
        try:
            descriptor = os.open(
                self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise self._error("lock the supervisor's directory", error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def listen(self) -> socket.socket:
        """Return the listening socket, in place of what a dead supervisor left. Only for the holder of the lock."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.unlisten()
            with self._short_name() as name:
                listener.bind(name)
            (self.directory / _SOCKET).chmod(0o600)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise self._error("listen for commands", error) from error
        return listener

    @property
    def socket_inode(self) -> int | None:
        """Which file the socket is; None when it is not there."""
        try:
            return (self.directory / _SOCKET).stat().st_ino
        except OSError:
            return None

    def unlisten(self) -> None:
        """Remove the socket's name: who comes now starts another supervisor."""
        with suppress(FileNotFoundError):
            (self.directory / _SOCKET).unlink()

    @contextmanager
    def _short_name(self) -> Iterator[str]:
        # A socket's name has at most 107 bytes (unix(7)), and a cache directory may lie deeper than that.
        descriptor = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{descriptor}/{_SOCKET}"
        finally:
            os.close(descriptor)

    def _error(self, operation: str, error: OSError) -> HostError:
        return HostError(
            f"{operation} in {self.directory}",
            error.strerror or str(error),
            f"Set {RUNTIME_VARIABLE} to a directory of a local file system",
        )


def peer_uid(sock: socket.socket) -> int:
    """Return the user at the other end of a Unix socket, as the kernel knows it (SO_PEERCRED, unix(7))."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    return int(uid)
