"""A file is named after the one noun in it, and every module of src/ is named by a test."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "service", "base"}

SOURCES = [
    path for folder in ("src", "guest", "confine") for path in (ROOT / folder).rglob("*.[pch]*")
]
MODULES = sorted(
    ".".join(path.relative_to(SRC).with_suffix("").parts)
    for path in SRC.rglob("*.py")
    if not path.name.startswith("__")
)
TESTS = "\n".join(
    path.read_text(encoding="utf-8")
    for path in (ROOT / "tests").rglob("*.py")
    if path.parent != ROOT / "tests"
)


def test_no_file_is_named_after_nothing_in_particular() -> None:
    vague = [path for path in SOURCES if set(re.split(r"[_.-]", path.stem)) & VAGUE]

    assert vague == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_named_by_a_test_that_imports_or_describes_it(module: str) -> None:
    package, _, leaf = module.rpartition(".")

    named = rf"\b{re.escape(module)}\b|\bfrom {re.escape(package)} import \(?[\w\s,]*\b{leaf}\b"
    assert re.search(named, TESTS)
