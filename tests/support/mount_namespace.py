"""Mounts of the tests' own: seen by one process and its children, and gone with it."""

from __future__ import annotations

import ctypes
import os

MS_PRIVATE, MS_REC = 1 << 18, 1 << 14
CLONE_NEWNS = 0x20000

libc = ctypes.CDLL(None, use_errno=True)
_reasons: list[str] = []


def make_mounts_private() -> str:
    """Leave the host's mount namespace, once, and return why that cannot be, or "".

    unshare(2) is of one thread, and those that it starts from then on: called late, it would leave a test's thread with
    other mounts than one that was started by an earlier test.
    """
    if not _reasons:
        _reasons.append(_leave())
    return _reasons[0]


def _leave() -> str:
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "mounting FUSE needs root and /dev/fuse: the kernel tests did NOT run"
    if libc.unshare(CLONE_NEWNS) or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
        return f"no private mount namespace ({os.strerror(ctypes.get_errno())}): NOT run"
    return ""
