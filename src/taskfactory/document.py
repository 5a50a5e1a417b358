"""A YAML or JSON file with the line of every key, for errors a person can act on.

YAML is read by the 1.2 core schema with timestamps left as text, whatever a `%YAML` directive says:
`no` is a word, `2026-02-22T20:15:03.412Z` stays as it was written. JSON is read by the same parser,
because it is YAML and has lines then. Files may come from an agent: size, depth and node count are
bounded, and so are aliases (each use of one counts, so nested aliases cannot explode). Explicit tags
are refused.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.scalarbool import ScalarBoolean
from ruamel.yaml.scalarstring import ScalarString

from taskfactory.errors import ConfigError, Problem
from taskfactory.sandboxconfig import KeyPath, Source

MAX_BYTES = 1024 * 1024  # a task with its summary and diffs is some hundred KiB
MAX_NODES = 200_000
MAX_DEPTH = 40

_TIMESTAMP = "tag:yaml.org,2002:timestamp"


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file. `data` is plain Python (dict, list, str, …); `node` keeps comments and order for rewriting."""

    name: str
    data: object
    node: Any  # ruamel's own tree, which is untyped
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def where(self, key: KeyPath = ()) -> str:
        """Return `file:line` of a key, or of the nearest key above it."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.name}:{self.lines.get(key, 1)}"

    def mapping(self) -> dict[str, object]:
        """Return `data`, which must be a mapping with text keys. Raises ConfigError."""
        if self.data is None:
            return {}
        if not isinstance(self.data, dict):
            raise ConfigError(
                [Problem(self.where(), "", "the file is not a mapping of keys to values")]
            )
        return self.data

    def source(self, *prefix: str) -> Source | None:
        """Return the part below the keys `prefix` for `merge_sandbox`, or None when there is none."""
        data: object = self.mapping()
        for key in prefix:
            data = data.get(key) if isinstance(data, dict) else None
        return None if data is None else Source(data=data, where=self.where, prefix=prefix)


def read_document(path: Path) -> Document:
    """Read a YAML or JSON file. Raises ConfigError with the line of what is wrong."""
    text = read_bounded_text(path)
    if path.suffix == ".json":
        # A tab indents JSON but not YAML; a JSON string cannot hold one, so nothing else changes.
        text = text.replace("\t", " ")
    return parse_document(text, str(path))


def read_bounded_text(path: Path) -> str:
    """Return the text of a file of at most MAX_BYTES. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _refusal(str(path), f"it cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise _refusal(str(path), f"it has more than {MAX_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refusal(str(path), f"byte {error.start} is not UTF-8") from None


def parse_document(text: str, name: str, *, first_line: int = 1) -> Document:
    """Parse YAML. `first_line` is the line of the file at which `text` begins. Raises ConfigError."""
    try:
        node = round_trip_yaml().load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = first_line + (mark.line if mark is not None else 0)
        cause = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError([Problem(f"{name}:{line}", "", f"not valid YAML: {cause}")]) from error
    except Exception as error:  # noqa: BLE001 - the file may be hostile, and ruamel fails in many ways
        # Too deep, a number of a million digits, a mapping as a key, a merge of itself.
        raise _refusal(name, f"not readable as YAML: {error}") from None
    plainer = _Plainer(name, first_line)
    return Document(name, plainer.plain(node, ()), node, plainer.lines)


def dump_document(node: object) -> str:
    """Return a tree of `Document.node` (or plain values) as YAML."""
    stream = io.StringIO()
    round_trip_yaml().dump(node, stream)
    return stream.getvalue()


def round_trip_yaml() -> YAML:
    """Return a YAML reader and writer that keeps comments and leaves timestamps alone."""
    yaml = YAML(typ="rt")
    yaml.Resolver = _Resolver
    yaml.Composer = _Composer
    yaml.width = 1_000_000  # Task Factory folds no lines either
    yaml.preserve_quotes = True
    yaml.allow_unicode = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


# Reading...


class _Resolver(VersionedResolver):
    """The YAML 1.2 rules, less timestamps."""

    @property
    def processing_version(self) -> tuple[int, int]:
        return (1, 2)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        return self.DEFAULT_SCALAR_TAG if str(tag) == _TIMESTAMP else tag


class _Composer(Composer):
    """Stops at MAX_DEPTH: ruamel takes time square in the depth, and then Python's stack ends.

    Refuses explicit tags (`!!int`): no file of ours has one, and ruamel fails on wrong ones in many ways.
    """

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if getattr(event, "tag", None) is not None:
            raise MarkedYAMLError(
                problem="a tag (!…) is not allowed", problem_mark=event.start_mark
            )
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Plainer:
    """Turns ruamel's tree into plain values, bounded, and notes the line of each key."""

    def __init__(self, name: str, first_line: int) -> None:
        self._name = name
        self._first_line = first_line
        self._nodes = 0
        self.lines: dict[KeyPath, int] = {}

    def plain(self, node: object, path: KeyPath) -> object:
        self._nodes += 1
        if self._nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise _refusal(
                self._name, f"more than {MAX_NODES} values (aliases count), or {MAX_DEPTH} levels"
            )
        if isinstance(node, CommentedMap):
            return {
                self._key(node, key, path): self.plain(node[key], (*path, str(key))) for key in node
            }
        if isinstance(node, CommentedSeq):
            return [self._item(node, index, path) for index in range(len(node))]
        if isinstance(node, ScalarString):
            return str(node)
        if isinstance(node, bool) or node is None:
            return node
        if isinstance(node, ScalarBoolean):
            return bool(node)
        if isinstance(node, int):
            return int(node)
        if isinstance(node, float):
            return float(node)
        if isinstance(node, str):
            return node
        raise ConfigError(
            [Problem(self._where(path), "", f"a value of an unknown kind ({node!r:.60})")]
        )

    def _key(self, node: CommentedMap, key: object, path: KeyPath) -> str:
        if not isinstance(key, str | int | float):
            raise ConfigError([Problem(self._where(path), "", "a key is not plain text")])
        position = (node.lc.data or {}).get(key)  # none for a key that came through a `<<` merge
        if position is not None:
            self.lines[*path, str(key)] = self._first_line + position[0]
        return str(key)

    def _item(self, node: CommentedSeq, index: int, path: KeyPath) -> object:
        position = (node.lc.data or {}).get(index)
        if position is not None:
            self.lines[*path, index] = self._first_line + position[0]
        return self.plain(node[index], (*path, index))

    def _where(self, path: KeyPath) -> str:
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self._name}:{self.lines.get(path, self._first_line)}"


def _refusal(name: str, text: str) -> ConfigError:
    return ConfigError([Problem(f"{name}:1", "", text)])
