"""A workspace: a directory that agents work in, and the user's file that says what their sandbox may do.

Rule 1: the file that decides about a sandbox lies outside every directory an agent can write.
        A path that leads into the workspace by any link is refused.
Rule 2: the registry is the Task Factory's: `workspaces.json`, a list of {id, path, name}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from taskfactory.document import read_document
from taskfactory.errors import ConfigError, Problem, UnsafePathError
from taskfactory.sandboxconfig import Source

MAX_LINKS = 40  # the kernel's own limit (MAXSYMLINKS in linux/namei.h)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


@dataclass(frozen=True, slots=True)
class Workspace:
    """A directory for agents, as its user spells it. Unregistered: `id` and `config_path` are None."""

    path: Path
    id: str | None = None
    name: str = ""
    config_path: Path | None = None

    def sandbox_source(self) -> Source | None:
        """Return what the workspace's file says, or None when there is none. Raises ConfigError, UnsafePathError."""
        if self.config_path is None:
            return None
        refuse_inside(self.path, self.config_path, "sandbox file")
        document = read_document(self.config_path)
        return Source(data=document.mapping(), where=document.where)


def open_workspace(path: Path, home: Path, config_path: Path | None = None) -> Workspace:
    """Return the workspace at `path`; `config_path` replaces the file that its registration leads to.

    Raises ConfigError for a directory that is none or a broken registry, and UnsafePathError for a
    Task Factory home inside the workspace.
    """
    root = path.resolve()
    if not root.is_dir():
        raise ConfigError([Problem(str(path), "", "the workspace is not a directory")])
    refuse_inside(root, home, "Task Factory home")
    entry = _registered(root, home)
    if config_path is None and entry is not None:
        candidate = home / "workspaces" / entry[0] / "sandbox.json"
        config_path = candidate if _may_say(candidate) else None
    if config_path is not None:
        refuse_inside(root, config_path, "sandbox file")
    workspace_id, name = entry or (None, root.name)
    return Workspace(path=path.absolute(), id=workspace_id, name=name, config_path=config_path)


def refuse_inside(workspace: Path, path: Path, what: str) -> None:
    """Raise UnsafePathError when the way to `path` leads into `workspace`, by whatever link."""
    root = workspace.resolve()
    inside = any(place != root and place.is_relative_to(root) for place in _way(path))
    if inside or path.resolve() == root:
        raise UnsafePathError(
            f"use the {what} {path}: it lies in the workspace {root}, or a link there leads to it,"
            " where an agent could rewrite it. Move it elsewhere"
        )


def _way(path: Path) -> Iterator[Path]:
    """Every file, directory and link that the kernel visits on the way to `path`, which may not exist."""
    place, rest = Path("/"), list(reversed(path.absolute().parts[1:]))
    links = 0
    while rest:
        part = rest.pop()
        place = place.parent if part == ".." else place / part
        yield place
        if place.is_symlink():
            links += 1
            if links > MAX_LINKS:
                raise UnsafePathError(f"use {path}: more than {MAX_LINKS} links lead to it")
            target = place.readlink()
            place = Path("/") if target.is_absolute() else place.parent
            rest += [part for part in reversed(target.parts) if part != "/"]


def _may_say(path: Path) -> bool:
    """Whether the user may have a file at `path`: only one that is certainly missing says nothing.

    A link that leads nowhere (a disk that is not mounted) or a directory that may not be entered hides what it says,
    perhaps that a sandbox is demanded. Reading it is an error then.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return any(place.is_symlink() and not place.exists() for place in _way(path))
    except OSError:
        return True
    return True


def _registered(root: Path, home: Path) -> tuple[str, str] | None:
    registry = home / "workspaces.json"
    if not _may_say(registry):
        return None
    document = read_document(registry)
    if not isinstance(document.data, list):
        raise ConfigError(
            [Problem(document.where(), "", "the registry is not a list of workspaces")]
        )
    for index, entry in enumerate(document.data):
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ConfigError([Problem(document.where((index,)), f"[{index}]", "it has no path")])
        if Path(entry["path"]).resolve() == root:
            identity = str(entry.get("id", ""))
            if not _ID.match(identity):
                cause = f"{identity!r} cannot be the name of a directory"
                raise ConfigError([Problem(document.where((index, "id")), f"[{index}].id", cause)])
            return identity, str(entry.get("name") or root.name)
    return None
