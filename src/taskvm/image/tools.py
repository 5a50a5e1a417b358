"""Programs of the host that build an image: found, or named with the command that installs them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from taskvm.errors import ImageError
from taskvm.interruption import CHECK_INTERVAL_S, check

# mke2fs and friends live where an ordinary user's PATH often does not reach.
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def require_tool(name: str, package: str) -> str:
    """Return the path of a program. Raises ImageError naming the Debian package that holds it."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")
    if path is None:
        raise ImageError(
            f"find the program {name}",
            "it is not installed",
            f"Install it: sudo apt-get install --no-install-recommends {package}",
        )
    return path


def run_tool(
    operation: str, argv: Sequence[str], environment: Mapping[str, str] | None = None
) -> str:
    """Run a program to its end and return its standard output. Raises ImageError with the end of its complaint."""
    program = shutil.which(argv[0], path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}") or argv[0]
    try:
        process = subprocess.Popen(
            [program, *argv[1:]],
            env={**os.environ, **(environment or {}), "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise ImageError(operation, f"{argv[0]} cannot be run: {error.strerror}") from error
    with process:
        try:
            output, complaint = _communicate(process)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        tail = complaint.strip()[-800:] or "no message"
        raise ImageError(operation, f"{argv[0]} ended with {process.returncode}: {tail}")
    return output


def _communicate(process: subprocess.Popen[str]) -> tuple[str, str]:
    while True:
        try:
            return process.communicate(timeout=CHECK_INTERVAL_S)
        except subprocess.TimeoutExpired:  # nothing is lost: the next call goes on
            check()
