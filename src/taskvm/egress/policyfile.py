"""The file form of a policy, TOML or JSON: its keys and types, and the line where a key stands.

    allow = ["index.example.org", "*.files.example.org"]

    [[rules]]
    name = "read the repository"
    action = "allow"
    hosts = ["api.github.com"]
    methods = ["GET"]
    paths = ["/repos/acme/**"]

What the texts mean is read in `taskvm.egress.policy`; this module says only where they stand.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Literal

import msgspec

from taskvm.errors import UsageError

MAX_FILE = 1024 * 1024  # bytes
KeyPath = tuple[str | int, ...]

_HEADER = re.compile(r"\s*\[(\[?)\s*([^\]]+?)\s*\]")
_MISTAKE = re.compile(r"(.*) - at `\$(.*)`\Z")
_FIELD = re.compile(r"Object (?:contains )?(unknown|missing required) field `(.*)`", re.DOTALL)
_TOML_LINE = re.compile(r"\(at line (\d+), column \d+\)\Z")
_TOML_PLACE = re.compile(r" \(at [^()]*\)\Z")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_TOKEN = re.compile(r"\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|\]")
_SPACE = re.compile(r"\s*")


class RuleTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[rules]]` table."""

    name: str = ""
    action: Literal["allow", "deny"]
    hosts: tuple[str, ...]
    scheme: Literal["http", "https"] | None = None
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


class PolicyDocument(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole file. `rules` come before `allow`; the first that names a request decides."""

    rules: tuple[RuleTable, ...] = ()
    allow: tuple[str, ...] = ()
    allow_addresses: tuple[str, ...] = ()


def parse_document(text: str, name: str) -> PolicyDocument:
    """Read the text of the file `name`: JSON when it starts with a brace, else TOML.

    Raises UsageError that names the file and the line.
    """
    operation = f"read the policy file {name}"
    try:
        data = json.loads(text) if _is_json(text) else tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{operation}, line {error.lineno}", f"it is no JSON: {error.msg}"
        ) from error
    except tomllib.TOMLDecodeError as error:
        place = _TOML_LINE.search(str(error))
        line = int(place[1]) if place else text.rstrip().count("\n") + 1
        cause = _TOML_PLACE.sub("", str(error))
        raise UsageError(f"{operation}, line {line}", f"it is no TOML: {cause}") from error
    except RecursionError as error:
        raise UsageError(operation, "it is nested too deeply") from error
    try:
        return msgspec.convert(data, PolicyDocument)
    except msgspec.ValidationError as error:
        mistake = _MISTAKE.match(str(error))
        cause, path = (mistake[1], _parse_path(mistake[2])) if mistake else (str(error), ())
        cause, path, next_step = _explain(cause, path)
        raise UsageError(f"{operation}, line {find_line(text, path)}", cause, next_step) from error


def _explain(cause: str, path: KeyPath) -> tuple[str, KeyPath, str]:
    """Return what msgspec says of a place in the words of the file: the cause, its place and the next step."""
    table, whose = (RuleTable, "a rule") if path[:1] == ("rules",) else (PolicyDocument, "a policy")
    key = next((step for step in reversed(path) if isinstance(step, str)), "")
    if field := _FIELD.fullmatch(cause):
        if field[1] == "missing required":
            return f"{whose} needs the key {field[2]!r}", path, "Add it"
        known = ", ".join(table.__struct_fields__)
        return (
            f"there is no key {field[2]!r}",
            (*path, field[2]),
            f"The keys of {whose} are {known}",
        )
    if cause.startswith("Invalid enum value"):
        known = '"allow" or "deny"' if key == "action" else '"https" or "http"'
        return (
            f"{key}: {cause.removeprefix('Invalid enum value ')} is not known",
            path,
            f"Write {known}",
        )
    return f"{key}: {cause}" if key else cause, path, ""


def find_line(text: str, path: KeyPath) -> int:
    """Return the number of the line where a key, or an entry of a list, of the document stands."""
    position = _find_in_json(text, path) if _is_json(text) else _find_in_toml(text, path)
    return text.count("\n", 0, position) + 1


def render_document(document: PolicyDocument) -> str:
    """Return the TOML text that `parse_document` reads back as this document."""
    lines = _render_keys({"allow": document.allow, "allow_addresses": document.allow_addresses})
    for table in document.rules:
        lines += ["", "[[rules]]", *_render_keys(msgspec.to_builtins(table))]
    return "\n".join(lines).lstrip("\n") + "\n" if lines else "# nothing is allowed\n"


def _render_keys(values: Mapping[str, object]) -> list[str]:
    # A JSON string is a basic string of TOML (its escapes are a subset), a list of them an array.
    return [
        f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
        if value not in (None, "", (), [])
    ]


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


def _parse_path(text: str) -> KeyPath:
    """Read msgspec's way of naming a place, such as `.rules[0].hosts`."""
    return tuple(key or int(index) for key, index in _STEP.findall(text))


def _find_in_json(text: str, path: KeyPath) -> int:
    """Walk down: members and entries before the one that is meant are decoded and skipped."""
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    for step in path:
        if text[position] not in "{[":
            break
        is_object = text[position] == "{"
        place, index = position, 0
        position = _skip(text, position + 1)
        while text[position] not in "}]":
            start, key = position, index
            if is_object:
                key, position = decoder.raw_decode(text, position)
                position = _skip(text, _skip(text, position) + 1)
            if key == step:
                place = start if step == path[-1] else position
                break
            position = _skip(text, decoder.raw_decode(text, position)[1])
            position = _skip(text, position + 1) if text[position] == "," else position
            index += 1
        position = place
    return position


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return position if match is None else match.end()


def _find_in_toml(text: str, path: KeyPath) -> int:
    """Look for the table's header, then for the key in it, then for the entry after the key.

    A table that is written in one line, or an entry that cannot be told, gives the line above it.
    """
    lines = text.splitlines(keepends=True)
    table, wanted = "", -1
    keys = [step for step in path if isinstance(step, str)]
    numbers = [step for step in path if isinstance(step, int)]
    in_rules = path[:1] == ("rules",)
    key = (keys[1] if len(keys) > 1 else "") if in_rules else (keys[0] if keys else "")
    offset = best = 0
    for line in lines:
        if header := _HEADER.match(line):
            table, wanted = header[2], wanted + (header[2] == "rules")
        right = table == "rules" and numbers[:1] == [wanted] if in_rules else not table
        if right and (header or _is_key(line, key)):
            best = offset
            if not header:
                return _find_entry(text, offset, numbers[in_rules:])
        offset += len(line)
    return best


def _is_key(line: str, key: str) -> bool:
    return bool(key) and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line) is not None


def _find_entry(text: str, offset: int, numbers: list[int]) -> int:
    if not numbers:
        return offset
    entries = []
    for token in _TOKEN.finditer(text, text.index("=", offset)):
        if token[0] == "]":
            break
        entries.append(token.start())
    return entries[numbers[0]] if numbers[0] < len(entries) else offset
