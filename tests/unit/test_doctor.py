"""taskvm.doctor calls a fault what stops every sandbox, and nothing else."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from taskvm import doctor
from taskvm.doctor import Finding, examine

GIB = 1024**3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TASKVM_CACHE", str(tmp_path))
    return tmp_path


async def finding(name: str) -> Finding:
    return next(found for found in await examine() if found.name == name)


async def test_a_damaged_image_stops_no_sandbox(cache: Path) -> None:
    """The default one is built anew, and others are sound; it is named, with what removes it."""
    (cache / "images" / ("ab" * 32)).mkdir(parents=True)

    found = await finding("image")

    assert found.status == "note"
    assert "abababababab (manifest.json" in found.text
    assert found.remedy == "taskvm image rm abababababab"


@pytest.mark.parametrize(
    ("free", "status"), [(GIB // 2, "fault"), (2 * GIB, "note"), (4 * GIB, "ok")]
)
async def test_a_disk_is_too_full_where_a_start_refuses_it(
    monkeypatch: pytest.MonkeyPatch, free: int, status: str
) -> None:
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)

    assert (await finding("disk")).status == status


async def test_what_cannot_be_found_out_is_said_and_hides_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A busy host's time-out is no traceback, and no verdict."""

    def run(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.setattr(doctor.subprocess, "run", run)
    findings = await examine()

    assert [found.status for found in findings if found.name == "confinement"] == ["note"]
    assert [found.name for found in findings] == list(doctor._CHECKS)
