"""The files that belong to a task: `attachments/` beside its `task.yaml`, as the Task Factory stores them.

Rule 1: the task's file may be an agent's work, and so may be what lies beside it. A stored name is one
        plain name, no link is followed below the task's own directory, and only a regular file is read:
        nothing else of the host reaches an agent as an attachment.
Rule 2: a file that is missing or too large ends the run before anything has started.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from taskfactory.errors import ConfigError, Problem
from taskfactory.task import Attachment
from taskfactory.taskfile import TaskFile

MAX_COUNT = 100
MAX_BYTES = 20 * 1024 * 1024  # of one file, as the Task Factory accepts it
MAX_TOTAL_BYTES = 64 * 1024 * 1024  # they are in memory until the sandbox runs

_FOLDER = "attachments"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


@dataclass(frozen=True, slots=True)
class AttachedFile:
    """An attachment, where it lies on the host, and what is in it."""

    attachment: Attachment
    path: Path
    data: bytes


def read_attachments(file: TaskFile) -> tuple[AttachedFile, ...]:
    """Return a task's attachments with their content. Raises ConfigError with everything that is wrong."""
    found: list[AttachedFile] = []
    problems: list[Problem] = []
    room = MAX_TOTAL_BYTES
    for index, attachment in enumerate(file.task.attachments):
        try:
            if index == MAX_COUNT:
                raise ValueError(f"a task has {MAX_COUNT} attachments at most")
            found.append(_read(file, attachment, min(room, MAX_BYTES)))
        except (OSError, ValueError) as error:
            cause = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            where = file.document.where(("attachments", index))
            text = f"the attachment {attachment.stored_name!r} cannot be used: {cause}"
            problems.append(Problem(where, f"attachments[{index}]", text))
        else:
            room -= len(found[-1].data)
        if index == MAX_COUNT:
            break
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def _read(file: TaskFile, attachment: Attachment, limit: int) -> AttachedFile:
    if not _PLAIN_NAME.match(attachment.stored_name):
        raise ValueError("its storedName is not a plain name of a file")
    for folder in _folders(file):
        try:
            data = _read_below(file.path.parent, (*folder, attachment.stored_name), limit)
        except FileNotFoundError:
            continue
        path = file.path.parent.absolute().joinpath(*folder, attachment.stored_name)
        return AttachedFile(attachment, path, data)
    raise ValueError(f"it is not in {file.path.parent.absolute() / _FOLDER}")


def _folders(file: TaskFile) -> Iterator[tuple[str, ...]]:
    """Below the directory of the task's file: `task.yaml` has them beside it, `app-1.md` in `app-1/`."""
    yield (_FOLDER,)
    name = file.task.id.lower()
    if _PLAIN_NAME.match(name):
        yield (name, _FOLDER)


def _read_below(directory: Path, way: tuple[str, ...], limit: int) -> bytes:
    *folders, name = way
    at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            below = os.open(folder, flags, dir_fd=at)
            os.close(at)
            at = below
        # O_NONBLOCK: a FIFO must not hold the run up.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(name, flags, dir_fd=at), "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise ValueError("it is not a regular file")
            data = opened.read(limit + 1)
    finally:
        os.close(at)
    if len(data) > limit:
        raise ValueError(
            f"more than {MAX_BYTES >> 20} MiB, or {MAX_TOTAL_BYTES >> 20} MiB with the others"
        )
    return data
