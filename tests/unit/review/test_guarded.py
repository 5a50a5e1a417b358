"""Which changes are applied only when that is asked for (taskvm.review.guarded)."""

import pytest

from taskvm.review.guarded import guard_of

GUARDED = [
    ".git/hooks/pre-commit",
    ".git/config",
    ".GIT/config",
    ".git/config.worktree",
    ".git/info/attributes",
    ".git/objects/info/alternates",
    ".git/modules/sub/hooks/post-checkout",
    ".git/worktrees/one/gitdir",
    ".git/rebase-merge/git-rebase-todo",
    "sub/.git/config",
    "sub/.git",
    ".gitmodules",
    ".envrc",
    "deep/down/.vscode/tasks.json",
    ".claude/settings.json",
    ".mcp.json",
]
FREE = [
    ".git/HEAD",
    ".git/index",
    ".git/refs/heads/main",
    ".git/objects/ab/cdef",
    ".git/logs/HEAD",
    ".gitignore",
    "src/config",
    "hooks/useState.ts",
    "Makefile",
]


def guard(
    path: str, *, kind: str = "file", there: tuple[str, ...] = (), target: str | None = None
) -> str:
    return guard_of(path, kind=kind, has=lambda other: other in there, target=target)


@pytest.mark.parametrize("path", GUARDED)
def test_what_the_host_obeys_is_guarded(path: str) -> None:
    assert guard(path)


@pytest.mark.parametrize("path", FREE)
def test_history_and_ordinary_files_are_not(path: str) -> None:
    assert not guard(path)


@pytest.mark.parametrize("path", ["bare/config", "bare/hooks/post-update", "bare/HEAD"])
def test_a_directory_that_looks_like_a_repository_is_one(path: str) -> None:
    """git takes any directory with HEAD, objects and refs for a repository, without `.git` in its name."""
    assert guard(path, there=("bare/HEAD", "bare/config"))


@pytest.mark.parametrize(
    ("path", "target", "outside"),
    [
        ("link", "note", False),
        ("a/link", "../note", False),
        ("a/link", "../../note", True),
        ("link", "..", True),
        ("link", "/etc/passwd", True),
        ("a/b/link", "../c/../../../x", True),
        ("a/link", ".", False),
    ],
)
def test_a_link_that_leads_out_is_guarded(path: str, target: str, outside: bool) -> None:
    assert bool(guard(path, kind="symlink", target=target)) is outside


def test_a_repository_that_becomes_a_link_is_guarded() -> None:
    assert guard(".git", kind="symlink", target="other")
    assert guard(".git/objects", kind="symlink", target="../other")
    assert not guard(".git", kind="dir")
