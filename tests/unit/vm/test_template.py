"""Templates that are not used any more, beside processes that build and use others (taskvm.vm.template)."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from taskvm.paths import hold
from taskvm.vm import template
from taskvm.vm.template import KEPT_TEMPLATES


def build(base: Path, name: str) -> None:
    """What a builder does last."""
    (base / name).mkdir()
    (base / name / "ram").write_bytes(b"memory")
    template._remove_old(base)


def test_builders_that_remove_what_is_old_do_not_trip_over_each_other(tmp_path: Path) -> None:
    """As the workers of a test run, and the sandboxes of several programs, do."""

    def build_many(worker: str) -> None:
        for number in range(50):
            build(tmp_path, f"{worker}{number}")

    with ThreadPoolExecutor(4) as builders:
        list(builders.map(build_many, "abcd"))
    template._remove_old(tmp_path)

    assert len(list(tmp_path.iterdir())) == KEPT_TEMPLATES


def test_what_is_held_stays_however_old(tmp_path: Path) -> None:
    build(tmp_path, "used")
    os.utime(tmp_path / "used", (1, 1))
    descriptor = hold(tmp_path / "used")
    for number in range(2 * KEPT_TEMPLATES):
        build(tmp_path, f"{number}")
    held = (tmp_path / "used" / "ram").exists()
    os.close(descriptor)
    template._remove_old(tmp_path)

    assert held
    assert not (tmp_path / "used").exists()
