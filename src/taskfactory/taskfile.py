"""A task's file on disk: `task.yaml` (the Task Factory's own form) or markdown with YAML frontmatter.

Rule 1: what this package does not know survives: unknown keys, comments, order, quoting.
Rule 2: a file is replaced in one step and on the disk before `save` returns; nobody sees half of it.
Rule 3: only values that changed are written.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

from taskfactory.document import (
    Document,
    dump_document,
    parse_document,
    read_bounded_text,
    read_document,
)
from taskfactory.errors import ConfigError, Problem
from taskfactory.sandboxconfig import Source
from taskfactory.task import Task, parse_phase

_FENCE = "---"


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task and the file it came from. `body` is None for a pure YAML file."""

    path: Path
    task: Task
    document: Document
    body: str | None = None

    def sandbox_source(self) -> Source | None:
        """Return what the task asks of its sandbox, with line numbers, for `merge_sandbox`."""
        return self.document.source("sandbox")


def load(path: Path) -> TaskFile:
    """Read a task file. Raises ConfigError with the lines of everything that is wrong."""
    if path.suffix != ".md":
        document = read_document(path)
        return TaskFile(path, _parse_task(document, None), document)
    head, body, first_line = _split(read_bounded_text(path), str(path))
    document = parse_document(head, str(path), first_line=first_line)
    return TaskFile(path, _parse_task(document, body), document, body)


def save(file: TaskFile, task: Task) -> TaskFile:
    """Write `task` to the file, keeping everything else in it as it is. Returns the file as it is now."""
    node = file.document.node if isinstance(file.document.node, CommentedMap) else CommentedMap()
    before, after = _plain(file.task), _plain(task)
    body = file.body
    if body is not None:
        before.pop("description", None)
        after.pop("description", None)
        body = task.description
    for key in {**before, **after}:
        if key not in after:
            node.pop(key, None)
        elif before.get(key) != after[key]:
            node[key] = _yaml_value(after[key])
    replace_file(file.path, _render(dump_document(node), body).encode("utf-8"))
    return load(file.path)


def create(path: Path, task: Task) -> TaskFile:
    """Write a new task file; the name's suffix decides the form. Raises FileExistsError."""
    if path.exists():
        raise FileExistsError(f"create the task file {path}: it exists already")
    fields = _plain(task)
    body = None
    if path.suffix == ".md":
        body = task.description
        fields.pop("description", None)
    node = {key: _yaml_value(value) for key, value in fields.items()}
    replace_file(path, _render(dump_document(node), body).encode("utf-8"))
    return load(path)


def replace_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace a file's content in one step, durably. A reader sees the old content or the new.

    `mode` is that of a new file; one that exists keeps its own.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    mode = path.stat().st_mode & 0o7777 if path.exists() else mode
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)  # the new name is in the directory
    finally:
        os.close(directory)


# Reading...


def _split(text: str, name: str) -> tuple[str, str, int]:
    """Return the YAML between the fences, the markdown after them, and the YAML's first line."""
    lines = text.splitlines(keepends=True)
    fences = [number for number, line in enumerate(lines) if line.rstrip() == _FENCE]
    if len(fences) < 2 or fences[0] != 0:
        cause = "the file does not begin with YAML between two lines of ---"
        raise ConfigError([Problem(f"{name}:1", "", cause)])
    return "".join(lines[1 : fences[1]]), "".join(lines[fences[1] + 1 :]), 2


def _parse_task(document: Document, body: str | None) -> Task:
    fields = {key: value for key, value in document.mapping().items() if value is not None}
    phase = parse_phase(fields.get("phase", "backlog"))
    if phase is None:
        cause = f"{fields['phase']!r} is no phase of a pipeline"
        raise ConfigError([Problem(document.where(("phase",)), "phase", cause)])
    fields["phase"] = phase
    if body is not None:
        fields["description"] = body.strip("\n") + "\n" if body.strip() else ""
    if not isinstance(fields.get("sandbox", {}), dict):
        cause = "it is not a mapping of keys to values"
        raise ConfigError([Problem(document.where(("sandbox",)), "sandbox", cause)])
    try:
        return msgspec.convert(fields, Task)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        key = path.rstrip("`").lstrip(".")
        where = document.where(tuple(key.split("[")[0].split(".")))
        raise ConfigError([Problem(where, key, text)]) from None


# Writing...


def _plain(task: Task) -> dict[str, object]:
    plain = msgspec.to_builtins(task)
    assert isinstance(plain, dict)
    # omit_defaults would drop a phase or title that happens to be the default; a task always has them.
    always: dict[str, object] = {"id": task.id, "title": task.title, "phase": task.phase}
    return always | plain


def _yaml_value(value: object) -> object:
    if isinstance(value, str) and _fits_block(value):
        return LiteralScalarString(value)
    if isinstance(value, str) and not value.isprintable():
        return DoubleQuotedScalarString(value)  # its escapes keep line ends that YAML would fold
    if isinstance(value, dict):
        return {key: _yaml_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_yaml_value(item) for item in value]
    return value


def _fits_block(text: str) -> bool:
    """A literal block holds lines as they are; what it cannot hold is quoted, with escapes."""
    lines = text.split("\n")
    return (
        len(lines) > 1
        and all(line.isprintable() and line == line.rstrip() for line in lines)
        and not text[0].isspace()
    )


def _render(head: str, body: str | None) -> str:
    if body is None:
        return head
    text = body.strip("\n")
    return f"{_FENCE}\n{head}{_FENCE}\n" + (f"\n{text}\n" if text else "")
