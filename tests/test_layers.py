"""Who may import whom (docs/architecture.md, "Layers"): the order that keeps a security review short.

Reads the imports of every module with `ast`; what only a type checker sees does not count.
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SRC.rglob("*.py")
}

BASE = ("taskvm.printing", "taskvm.errors", "taskvm.arguments", "taskvm.egress.secret")
PURE = (
    *BASE,
    "taskvm.egress",
    "taskvm.egress.*",
    "taskvm.identity",
    "taskvm.resources",
    "taskvm.ring",
    "taskvm.wire.*",
)
SHARED = (
    "taskvm.port",
    "taskvm.background",
    "taskvm.interruption",
    "taskvm.opening",
    "taskvm.paths",
    "taskvm.room",
)
IO = (*PURE, *SHARED)
VALUES = ("taskfactory.errors", "taskfactory.task", "taskfactory.events")
FILES = tuple(
    f"taskfactory.{name}"
    for name in (
        "activity",
        "attachments",
        "document",
        "sandboxconfig",
        "settings",
        "store",
        "taskfile",
        "workspace",
    )
)

EFFECTS = ("asyncio", "logging", "random", "socket", "subprocess", "threading", "time")
SCREEN = ("click", "rich", "starlette", "uvicorn", "taskvm.cli", "taskvm.cli.*")
FRONT = ("taskfactory.cli", "taskfactory.web", "taskfactory.web.*")

# (modules, which of our own they may import, what they never import); the first line that matches counts.
RULES = (
    (BASE, BASE, EFFECTS),
    ((*PURE, "taskvm.vm.command"), PURE, EFFECTS),
    (SHARED, IO, SCREEN),
    (("taskvm.vm", "taskvm.vm.*"), (*IO, "taskvm.vm.*"), SCREEN),
    (("taskvm.fs", "taskvm.fs.*"), (*IO, "taskvm.fs", "taskvm.fs.*"), SCREEN),
    (("taskvm.net", "taskvm.net.*"), (*IO, "taskvm.net.*"), SCREEN),
    (("taskvm.image", "taskvm.image.*"), (*IO, "taskvm.image.*"), SCREEN),
    (
        ("taskvm.cli", "taskvm.cli.*"),
        (
            "taskvm",
            "taskvm.doctor",
            "taskvm.supervisor.*",
            "taskvm.wire.supervision",
            "taskvm.terminal",
            "taskvm.cli",
            "taskvm.cli.*",
        ),
        (),
    ),
    (("taskvm", "taskvm.*"), ("taskvm", "taskvm.*"), SCREEN),
    (VALUES, VALUES, EFFECTS),
    (FILES, (*VALUES, *FILES), FRONT),
    (
        ("taskfactory.sandboxing",),
        ("taskvm", "taskvm.errors", "taskfactory", "taskfactory.*"),
        FRONT,
    ),
    (FRONT, ("taskfactory", "taskfactory.*"), ()),
    (("taskfactory", "taskfactory.*"), ("taskfactory", "taskfactory.*"), FRONT),
)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from (name if name in MODULES else node.module for name in names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_its_own_layer_and_those_below(module: str) -> None:
    imported = set(_imports(ast.parse(MODULES[module].read_text(encoding="utf-8"))))
    _, may, never = next(rule for rule in RULES if _matches(module, rule[0]))

    ours = {name for name in imported if name.split(".")[0] in ("taskvm", "taskfactory")}
    assert {name for name in ours if not _matches(name, may)} == set()
    assert {
        name for name in imported if _matches(name, never) or _matches(name.split(".")[0], never)
    } == set()
