"""taskvm.image.build: a build that cannot succeed is refused before it starts."""

import platform
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from taskvm.errors import ImageError
from taskvm.image.build import build_assets, runs_programs_of
from taskvm.image.manifest import DEBIAN_ARCHITECTURES, ImageSpec


class Usage(NamedTuple):
    """The result of shutil.disk_usage."""

    total: int
    used: int
    free: int


def refuse_progress(line: str) -> None:
    """Fail when the build gets as far as doing something."""
    raise AssertionError(line)


def test_another_architecture_needs_a_host_that_runs_its_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = next(name for name in DEBIAN_ARCHITECTURES if name != platform.machine())
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)

    with pytest.raises(ImageError, match=f"runs no programs of {foreign}.*qemu-user-static"):
        build_assets(ImageSpec(arch=foreign), tmp_path, refuse_progress)


@pytest.mark.parametrize(("status", "runs"), [(0, True), (1, False)])
def test_whether_the_host_runs_programs_is_asked_of_arch_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, runs: bool
) -> None:
    tester = tmp_path / "arch-test"
    tester.write_text(f'#!/bin/sh\ntest "$1" = arm64 && exit {status}\n')
    tester.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    assert runs_programs_of("arm64") is runs


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10, 9, 1))

    with pytest.raises(ImageError, match="TASKVM_CACHE"):
        build_assets(ImageSpec(), tmp_path, refuse_progress)


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name, path=None: None)

    with pytest.raises(ImageError, match="apt-get install --no-install-recommends mmdebstrap"):
        build_assets(ImageSpec(), tmp_path, refuse_progress)
