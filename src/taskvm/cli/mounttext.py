"""What --mount says, HOST:GUEST or HOST:GUEST:MODE."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import taskvm
from taskvm import UsageError

_MOUNT_MODES: dict[str, Literal["direct", "ro", "review"]] = {
    "rw": "direct",
    "ro": "ro",
    "review": "review",
}


def read_mount(text: str) -> tuple[str, taskvm.Provider]:
    """Return the guest's path and what is mounted there. Raises UsageError."""
    parts = text.split(":")
    if len(parts) == 2:
        parts.append("rw")
    if len(parts) != 3 or parts[2] not in _MOUNT_MODES:
        raise UsageError(
            f"read --mount {text}",
            "it is not HOST:GUEST or HOST:GUEST:MODE",
            "MODE is rw, ro or review",
        )
    host, guest, mode = parts
    if Path(host).expanduser().is_file():
        return guest, _mounted_file(text, host, _MOUNT_MODES[mode])
    return guest, taskvm.HostDir(host, mode=_MOUNT_MODES[mode])


def _mounted_file(text: str, host: str, mode: str) -> taskvm.Provider:
    if mode == "review":
        raise UsageError(
            f"read --mount {text}",
            "a single file cannot be reviewed",
            "Mount its directory for review, or the file ro",
        )
    return taskvm.HostFile(host, mode="ro" if mode == "ro" else "direct")


def absolute_mount(text: str) -> str:
    """Return the text as another process with another working directory understands it."""
    host, colon, rest = text.partition(":")
    return f"{Path(host).expanduser().absolute()}{colon}{rest}"
