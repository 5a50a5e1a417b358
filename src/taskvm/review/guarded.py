"""Which changes of a guest reach further than their file: what programs of the host run or obey by themselves.

A pure decision about a path (and a link's target). It errs on the side of asking; nothing here is a promise that all
other files are harmless: a build script is run by whoever builds.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable

# Read and obeyed by git for every command in the directory: hooks, filters, fsmonitor, the pager, other directories.
# What only holds history (objects, refs, logs, HEAD, index) is not among them.
_GIT_PARTS = frozenset(
    {
        "attributes",
        "commondir",
        "config",
        "config.worktree",
        "gitdir",
        "grafts",
        "hooks",
        "alternates",
        "rebase-merge",
        "sequencer",
    }
)
# Names at any depth that a shell, an editor or an agent acts on when it enters or opens the directory.
_OBEYED = {
    ".envrc": "direnv",
    ".mise.toml": "mise",
    ".tool-versions": "mise",
    ".vscode": "Visual Studio Code",
    ".idea": "JetBrains IDEs",
    ".devcontainer": "editors with containers",
    ".claude": "Claude Code",
    ".cursor": "Cursor",
    ".mcp.json": "agents with MCP",
    ".gitmodules": "git",
    ".husky": "git, through husky",
    ".pre-commit-config.yaml": "git, through pre-commit",
}


def guard_of(path: str, *, kind: str, has: Callable[[str], bool], target: str | None = None) -> str:
    """Return why a change of `path` is not applied unless it is asked for, or "".

    `kind` is the type of what the guest has there, `target` a link's. `has` says whether a path will be there, by this
    change or another or because it is already: a directory with the right names in it is a repository too.
    """
    parts = path.split("/")
    return (
        _git(parts, kind, has)
        or _obeyed(parts)
        or (_outside(parts, target) if target is not None else "")
    )


def _git(parts: list[str], kind: str, has: Callable[[str], bool]) -> str:
    folded = [part.casefold() for part in parts]  # a host's file system may not tell .GIT from .git
    if ".git" in folded:
        below = folded[folded.index(".git") + 1 :]
        if not below:
            return "" if kind == "dir" else "git takes its repository from where this says"
        return "git obeys it" if _GIT_PARTS.intersection(below) or kind == "symlink" else ""
    for depth, part in enumerate(folded):
        other = {"head": "config"}.get(part, "HEAD" if part in _GIT_PARTS else None)
        if other is not None and has("/".join([*parts[:depth], other])):
            return "git obeys it in a directory that looks like a repository"
    return ""


def _obeyed(parts: list[str]) -> str:
    for part in parts:
        if part.casefold() in _OBEYED:
            return f"{_OBEYED[part.casefold()]} may run what it says"
    return ""


def _outside(parts: list[str], target: str) -> str:
    resolved = posixpath.normpath(posixpath.join(*parts[:-1], target))
    if target.startswith("/") or resolved == ".." or resolved.startswith("../"):
        return "the link leads out of the directory"
    return ""
