"""Templates that are not used any more, beside processes that build and use others (taskvm.vm.template)."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from taskvm.paths import hold
from taskvm.vm import template
from taskvm.vm.template import KEPT_TEMPLATES


def build(base: Path, name: str) -> None:
    """What a builder does last: a template appears whole, in one rename."""
    staging = base / f".{name}"
    staging.mkdir()
    (staging / "ram").write_bytes(b"memory")
    staging.rename(base / name)
    template._remove_old(base)


def templates(base: Path) -> set[str]:
    """The names of all, those that are being built or removed included."""
    return {path.name for path in base.iterdir() if path.is_dir()}


def test_builders_that_remove_what_is_old_do_not_trip_over_each_other(tmp_path: Path) -> None:
    """As the workers of a test run, and the sandboxes of several programs, do."""

    def build_many(worker: str) -> None:
        for number in range(50):
            build(tmp_path, f"{worker}{number}")

    with ThreadPoolExecutor(4) as builders:
        list(builders.map(build_many, "abcd"))
    template._remove_old(tmp_path)

    assert len(templates(tmp_path)) == KEPT_TEMPLATES


def test_one_that_is_being_removed_is_neither_found_nor_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal of its files makes a directory the newest of all: a good one would go for it."""
    for number in range(KEPT_TEMPLATES + 1):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "ram").write_bytes(b"memory")
        os.utime(tmp_path / f"{number}", (number, number))
    remove, half_there = shutil.rmtree, set[str]()

    def remove_slowly(path: Path, **options: bool) -> None:
        if path.exists():
            monkeypatch.setattr(shutil, "rmtree", remove)
            (path / "ram").unlink()
            half_there.update(name for name in templates(tmp_path) if name[0] != ".")
            template._remove_old(tmp_path)  # somebody else's
            remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", remove_slowly)
    template._remove_old(tmp_path)

    assert "0" not in half_there
    assert templates(tmp_path) == {f"{number}" for number in range(1, KEPT_TEMPLATES + 1)}


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
