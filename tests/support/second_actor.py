"""Somebody else on the host who exchanges two names as fast as a processor can, and what he must not have changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SWAP = """
import ctypes, sys
rename = ctypes.CDLL(None).renameat2
first, second = (name.encode() for name in sys.argv[1:])
print("ready", flush=True)
while True:
    rename(-100, first, -100, second, 2)
"""


@contextmanager
def swapping(first: Path, second: Path) -> Iterator[None]:
    """Exchange what two names stand for (RENAME_EXCHANGE), from a process of its own."""
    command = [sys.executable, "-I", "-S", "-c", _SWAP, str(first), str(second)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as actor:
        assert actor.stdout is not None
        assert actor.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            actor.kill()


def fingerprint(root: Path) -> dict[str, object]:
    """Return names, modes, owners, links, times, attributes and bytes of all that is in `root`."""
    told: dict[str, object] = {}
    for path in sorted([root, *root.rglob("*")]):
        at = path.lstat()
        attributes = [
            (name, os.getxattr(path, name, follow_symlinks=False))
            for name in os.listxattr(path, follow_symlinks=False)
        ]
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        times = (at.st_mtime_ns, at.st_ctime_ns)
        told[str(path)] = (
            at.st_mode,
            at.st_uid,
            at.st_nlink,
            at.st_size,
            times,
            attributes,
            content,
        )
    return told
