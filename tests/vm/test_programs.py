"""Real programs in a real guest, working on a mounted directory of the host: none can tell it from a local disk.

Each leaves its result on the host, which is looked at with the host's own programs.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskvm import HostDir, Sandbox

pytestmark = pytest.mark.vm

GUEST = {"cpus": 1, "memory_mib": 512}  # npm takes 200 MiB


@pytest.fixture
async def vm(programs_image: str, workspace: Path) -> AsyncIterator[Sandbox]:
    """A guest with compilers and package managers, and `workspace` at /workspace."""
    mounts = {"/workspace": HostDir(workspace)}
    async with Sandbox.create(image=programs_image, mounts=mounts, **GUEST) as sandbox:
        yield sandbox


async def done(vm: Sandbox, script: str, cwd: str = "/workspace") -> str:
    """Run a shell script that must succeed, and return what it printed."""
    result = await vm.exec(["bash", "-euc", script], cwd=cwd, timeout_s=300)
    assert result.exit_code == 0, result.stdout + result.stderr
    return result.stdout


async def test_make_builds_a_c_program_and_only_what_changed(
    vm: Sandbox, workspace: Path, tmp_path: Path
) -> None:
    """make trusts the times that the mount tells: a second run does nothing, a touched source is compiled again."""
    (workspace / "Makefile").write_text(
        "app: main.o half.o\n\t$(CC) -o $@ $^\n%.o: %.c half.h\n\t$(CC) -c -o $@ $<\n"
    )
    (workspace / "half.h").write_text("int half(int);\n")
    (workspace / "half.c").write_text('#include "half.h"\nint half(int n) { return n / 2; }\n')
    (workspace / "main.c").write_text(
        '#include <stdio.h>\n#include "half.h"\nint main(void) { printf("%d\\n", half(42)); }\n'
    )

    first = await done(vm, "make && ./app")
    second = await done(vm, "make")
    third = await done(vm, "touch half.c && make")

    assert first.splitlines()[-1] == "21"
    assert "is up to date" in second
    assert ("half.c" in third, "main.c" in third) == (True, False)
    shutil.copy(workspace / "app", tmp_path / "app")
    assert subprocess.check_output([tmp_path / "app"]) == b"21\n"
