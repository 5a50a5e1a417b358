"""The public surface: one list in the documentation, two forms that do not drift apart, and a light import."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import taskvm
from taskvm import sync

ROOT = Path(__file__).parent.parent
# 0.2 on a quiet machine; CPU time grows by half when its cores are shared.
# Of the libraries that it stands on, in the same process: seconds of CPU double when every core is busy.
LIBRARIES = "asyncio, ssl, logging, msgspec, h11, h2.connection, qemu.qmp, cryptography.x509"
MAX_TIMES_ITS_LIBRARIES = 4
# Public on the asynchronous class for the engine's own use, which has no blocking form.
ENGINES_OWN = {"Files.list_layer", "Files.settle_layer", "WarmPool.take"}
# What is awaited or entered; the blocking surface returns the thing itself, which is entered.
AWAITED = {"Opening"}
TWINS = [name for name in sync.__all__ if getattr(sync, name) is not getattr(taskvm, name)]
METHODS = [
    f"{name}.{member}"
    for name in TWINS
    for member, value in vars(getattr(taskvm, name)).items()
    if not member.startswith("_") and not isinstance(value, property)
]
# What an asynchronous signature says in other words than its blocking twin.
BLOCKING_WORDS = {
    "AsyncIterator": "Iterator",
    "AsyncIterable": "Iterable",
    "AsyncGenerator[bytes]": "Generator[bytes, None, None]",
    "stdin: 'bytes | Iterator": "stdin: 'bytes | Iterable",
    "Opening[Sandbox]": "Sandbox",
    "Opening[Forward]": "Forward",
    "Opening[FileWatch]": "FileWatch",
    "builtins.list": "list",
    "aio.": "",
}


def _find(module: object, dotted: str) -> object:
    owner, _, member = dotted.partition(".")
    return getattr(getattr(module, owner), member)


def _said(function: object) -> str:
    text = str(inspect.signature(function))
    for word, blocking in BLOCKING_WORDS.items():
        text = text.replace(word, blocking)
    return text


def test_the_list_of_public_names_is_complete_and_in_the_documentation() -> None:
    """docs/api.md is what scripts/render-api makes of the source: run it when this fails."""
    command = [sys.executable, str(ROOT / "scripts" / "render-api"), "--check"]

    subprocess.run(command, check=True, cwd=ROOT, timeout=30)


@pytest.mark.parametrize("module", [taskvm, sync])
def test_every_public_name_exists_once_and_has_a_docstring(module: object) -> None:
    """What is exported is there, and says what it is."""
    names = module.__all__

    assert len(names) == len(set(names))
    assert [name for name in names if not inspect.getdoc(getattr(module, name))] == []


def test_every_class_that_waits_has_a_blocking_twin() -> None:
    """A public class with a coroutine is in taskvm.sync too."""
    waiting = {
        name
        for name in taskvm.__all__
        if any(map(inspect.iscoroutinefunction, vars(getattr(taskvm, name)).values()))
    }

    assert waiting - AWAITED - set(TWINS) == set()


@pytest.mark.parametrize("method", sorted(set(METHODS) - ENGINES_OWN))
def test_both_surfaces_have_the_same_signatures(method: str) -> None:
    """Names, parameters, defaults and types agree; a method that is added to one is added to the other."""
    assert _said(_find(sync, method)) == _said(_find(taskvm, method))


@pytest.mark.parametrize("name", TWINS)
def test_both_surfaces_have_the_same_members(name: str) -> None:
    """Neither has what the other lacks, attributes and properties included; `async with` has become `with`."""
    spelling = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__"}

    theirs = {spelling.get(each, each) for each in _members(getattr(taskvm, name))}
    theirs -= {each.partition(".")[2] for each in ENGINES_OWN if each.startswith(f"{name}.")}
    ours = _members(getattr(sync, name))
    assert ours == theirs | (ours & {"__enter__", "__exit__"})


def _members(owner: type) -> set[str]:
    entering = {"__aenter__", "__aexit__", "__aiter__", "__enter__", "__exit__", "__iter__"}
    tree = ast.parse(inspect.getsource(owner))
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return {
        name
        for name in attributes | set(vars(owner))
        if not name.startswith("_") or name in entering
    }


@pytest.mark.parametrize("module", ["taskvm", "taskvm.sync"])
def test_the_import_is_light(module: str) -> None:
    """No screen library, no command line, no thread; and little time, at best of three."""
    program = (
        "import json, sys, threading, time; first = time.process_time(); "
        f"import {LIBRARIES}; second = time.process_time(); "
        f"import {module}; times = (time.process_time() - second) / (second - first); "
        "print(json.dumps([times, threading.active_count(), list(sys.modules)]))"
    )
    runs = [
        json.loads(subprocess.check_output([sys.executable, "-c", program], timeout=30))
        for _ in range(3)
    ]

    heavy = {"click", "rich", "starlette", "uvicorn", "taskvm.cli", "taskfactory"}
    assert heavy & set(runs[0][2]) == set()
    assert runs[0][1] == 1
    assert min(run[0] for run in runs) <= MAX_TIMES_ITS_LIBRARIES


def test_the_package_says_that_it_is_typed() -> None:
    """Type checkers of users read the annotations (PEP 561)."""
    assert (Path(taskvm.__file__).parent / "py.typed").is_file()
