"""docs/guarantees.md promises nothing without a test: claims are numbered, and every test they name exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
CLAIMS = re.findall(r"^(\d+)\. (.+?)(?=^\d+\. |^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))


def test_claims_are_numbered_without_a_gap() -> None:
    assert [int(number) for number, _ in CLAIMS] == list(range(1, len(CLAIMS) + 1))
    assert CLAIMS


@pytest.mark.parametrize(("number", "claim"), CLAIMS)
def test_a_claim_names_a_test(number: str, claim: str) -> None:
    assert re.search(r"`tests/[\w/]+\.py::test_\w+`", claim), f"claim {number} is held by nothing"


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_exists_and_is_not_skipped(path: str, name: str) -> None:
    functions = {
        node.name: node
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }

    assert name in functions
    marks = " ".join(ast.unparse(mark) for mark in functions[name].decorator_list)
    assert "mark.skip(" not in marks
    assert "xfail" not in marks


def test_every_path_of_the_page_exists() -> None:
    paths = re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)", TEXT)

    assert [path for path in paths if not (ROOT / path).is_file()] == []
