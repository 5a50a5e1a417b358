"""docs/protocols.md: its table of limits says what the constants say, and misses none."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
ROWS = [
    (values.split(", "), re.findall(r"`([\w.]+)`", names))
    for values, names in re.findall(
        r"^\| [^|]+ \| ([0-9][^|]*) \| ([^|]+) \|$", PAGE.partition("## Limits")[2], re.MULTILINE
    )
]
NAMED = {name for _, names in ROWS for name in names}
UNITS = {"s": 1, "min": 60, "h": 3600, "KiB": 1024, "MiB": 1024 * 1024}
# The guest's way out; docs/protocol-control.md has the port's own, and the way in.
MODULES = [
    path for path in sorted((ROOT / "src/taskvm/net").glob("*.py")) if path.stem != "ingress"
]
LIMIT = re.compile(r"^((?:MAX|LEAST)_\w+|\w+_TIMEOUT_S|LINGER_\w+|\w+_THREADS) =", re.MULTILINE)
NO_LIMITS = {"net.gateway.MAX_EARLY_FRAMES"}  # of the port, before anything is served


def _value(text: str) -> float:
    number, _, unit = text.partition(" ")
    return float(number) * UNITS.get(unit, 1)


@pytest.mark.parametrize(("values", "names"), ROWS, ids=lambda each: each[0])
def test_a_limit_is_the_constant_that_it_names(values: list[str], names: list[str]) -> None:
    parts = [name.rpartition(".") for name in names]
    found = [getattr(import_module(f"taskvm.{module}"), constant) for module, _, constant in parts]

    assert [_value(value) for value in values] == found


def test_every_limit_of_the_gateway_is_in_the_table() -> None:
    constants = {
        f"net.{path.stem}.{name}"
        for path in MODULES
        for name in LIMIT.findall(path.read_text(encoding="utf-8"))
    }

    assert constants - NAMED - NO_LIMITS == set()
    assert len(ROWS) > 20
