"""What root has and other users of a host have not, taken from one thread for a while."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_DAC = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Let the modes of files hold for this thread, as for everybody who is not root."""
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    before, without = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, before))
    without[:] = before[:]
    without[0] &= ~_DAC  # of the first half, what is in effect
    _check(_libc.capset(header, without))
    try:
        yield
    finally:
        _check(_libc.capset(header, before))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
