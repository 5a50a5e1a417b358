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
    named = re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", claim)

    assert named, f"claim {number} is held by nothing"
    assert len(set(named)) == len(named), f"claim {number} names a test twice"


def _module(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def _functions(module: ast.Module) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name: node for node in module.body if isinstance(node, kinds)}


def _ways_to_skip(path: str, name: str) -> list[str]:
    """Return the source of all that may skip a test: its module's marks and calls, its own, and its fixtures'."""
    module = _module(path)
    functions = _functions(module)
    rest = [node for node in module.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    loose = [ast.unparse(node) for node in rest if getattr(node, "name", None) not in functions]
    marks = {line.partition(" = ")[0]: line for line in loose if "mark.skip" in line}
    found = [line for line in loose if re.search(r"pytest\.(skip|importorskip)\(", line)]
    found += [line for target, line in marks.items() if target == "pytestmark"]
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        if (each := waiting.pop()) in seen or each not in functions:
            continue
        seen.add(each)
        code = ast.unparse(functions[each])
        found += [marks.get(ast.unparse(mark), "") for mark in functions[each].decorator_list]
        found += re.findall(r"mark\.skip\w*\(.*|pytest\.(?:skip|importorskip)\(.*", code)
        waiting += [argument.arg for argument in functions[each].args.args]
        waiting += [
            word
            for mark in functions[each].decorator_list
            for word in re.findall(r"usefixtures\('(\w+)'", ast.unparse(mark))
        ]
    return [each for each in found if each]


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_exists_and_is_not_switched_off(path: str, name: str) -> None:
    functions = _functions(_module(path))

    assert name in functions
    marks = " ".join(ast.unparse(mark) for mark in functions[name].decorator_list)
    assert "mark.skip(" not in marks
    assert "xfail" not in marks
    assert not [
        way for way in _ways_to_skip(path, name) if "mark.skip(" in way or "importorskip" in way
    ]


@pytest.mark.parametrize(("number", "claim"), CLAIMS)
def test_a_claim_whose_tests_need_more_than_every_host_has_says_what(
    number: str, claim: str
) -> None:
    """Tests that are skipped without root, for example, hold nothing there."""
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", claim)

    if all(_ways_to_skip(*test) for test in tests):
        assert "(tested where " in claim, f"claim {number}"


def test_what_may_skip_a_test_is_seen() -> None:
    """A module's mark, a mark with a name, a fixture's call, and a call in the test itself."""
    for path, name in [
        (
            "tests/vm/test_aarch64.py",
            "test_a_guest_of_the_other_processor_runs_commands_and_serves_files",
        ),
        ("tests/security/test_supervisor_access.py", "test_another_user_is_hung_up_on"),
        (
            "tests/vm/test_crashes.py",
            "test_a_full_disk_at_a_start_from_a_template_is_a_clear_error",
        ),
        ("tests/vm/test_limits.py", "test_a_sandbox_gets_no_more_than_its_share_of_the_processor"),
    ]:
        assert _ways_to_skip(path, name), name
    assert not _ways_to_skip("tests/vm/test_exec.py", "test_every_byte_of_large_output_arrives")


def test_every_path_of_the_page_exists() -> None:
    paths = re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)", TEXT)

    assert [path for path in paths if not (ROOT / path).is_file()] == []
