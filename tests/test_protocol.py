"""The numbers of the contract between host and guest are the same in C, in Python and in its documentation."""

import ast
import operator
import re
from pathlib import Path

import pytest

from taskvm.wire import frames
from taskvm.wire.frames import FrameType

ROOT = Path(__file__).parent.parent
LIMITS = (ROOT / "guest" / "limits.h").read_text(encoding="utf-8")
DOCUMENT = (ROOT / "docs" / "protocol-control.md").read_text(encoding="utf-8")
DEFINES = dict(re.findall(r"^#define (\w+) +(.+?)(?: */\*.*)?$", LIMITS, re.MULTILINE))
SHARED = [name for name in DEFINES if not name.startswith(("CHANNEL_", "TASKVM_"))]

OPERATORS = {ast.Add: operator.add, ast.Mult: operator.mul}


def _value(node: ast.expr) -> int | str:
    """Evaluate a C constant expression of sums, products and literals."""
    if isinstance(node, ast.BinOp):
        result: int = OPERATORS[type(node.op)](_value(node.left), _value(node.right))
        return result
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, int | str)
    return node.value


@pytest.mark.parametrize("name", SHARED)
def test_a_limit_is_the_same_on_both_sides(name: str) -> None:
    expression = re.sub(r"(?<=[0-9a-f])u\b", "", DEFINES[name])

    assert _value(ast.parse(expression, mode="eval").body) == getattr(frames, name)


def test_frame_types_are_the_same_on_both_sides_and_in_the_document() -> None:
    ours = {member.name: int(member) for member in FrameType}

    guests = {name: int(number) for name, number in re.findall(r"FRAME_(\w+) = (\d+)", LIMITS)}
    documented = {
        name: int(number)
        for number, name in re.findall(r"^\| (\d+) \| (\w+) \|", DOCUMENT, re.MULTILINE)
    }

    assert guests == ours
    assert documented == ours


def test_enough_was_compared() -> None:
    assert {"MAX_PAYLOAD", "INITIAL_CREDIT", "PORT_NET", "PROTOCOL_VERSION"} <= set(SHARED)
