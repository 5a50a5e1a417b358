"""A wheel has in it what a source checkout builds first: whoever installs it needs no compiler."""

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIND = "import taskvm.vm.native as it, platform; print(it.confine_binary(), it.guest_binary(platform.machine()))"


def test_a_wheel_carries_the_native_programs(tmp_path: Path) -> None:
    """It says for which hosts it is, and what it has in it is found, executable, where it was unpacked."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*build, "--directory", tmp_path], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
        archive.extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", FIND], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()

    machine = platform.machine()
    assert wheel.name.endswith(f"-py3-none-manylinux2014_{machine}.whl")
    names = [f"taskvm/_native/taskvm-{part}-{machine}" for part in ("confine", "guest")]
    assert found == [str(tmp_path / name) for name in names]
    assert all(modes[name] & 0o111 for name in names)
    assert {"taskvm/py.typed", "taskvm/image/customize.sh", "taskfactory/cli.py"} <= modes.keys()
    assert not [name for name in modes if name.startswith(("tests", "docs", "guest"))]
