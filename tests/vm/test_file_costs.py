"""How many requests file work in a real guest costs, which is what makes it fast or slow (docs/files.md)."""

from __future__ import annotations

import hashlib
import os
import struct
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.conftest import GUEST

from taskvm import HostDir, Sandbox
from taskvm.fs.session import Reply, Session
from taskvm.wire.fuse import Opcode

pytestmark = pytest.mark.vm

_OPCODE = struct.Struct("<4xI")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the guest's kernel asks the host, by name."""
    counts: Counter[str] = Counter()
    handle = Session.handle

    def counted(session: Session, message: memoryview) -> Reply | None:
        opcode = _OPCODE.unpack_from(message)[0]
        counts[next((one.name for one in Opcode if one == opcode), str(opcode))] += 1
        return handle(session, message)

    monkeypatch.setattr(Session, "handle", counted)
    return counts


@pytest.fixture
async def vm(workspace: Path) -> AsyncIterator[Sandbox]:
    """With the same directory at /workspace, and read-only at /ro."""
    mounts = {"/workspace": HostDir(workspace), "/ro": HostDir(workspace, mode="ro")}
    async with Sandbox.create(mounts=mounts, **GUEST) as sandbox:
        yield sandbox


async def test_a_new_file_costs_four_requests(vm: Sandbox, asked: Counter[str]) -> None:
    """LOOKUP, CREATE, WRITE, and the directory's attributes; no OPEN, FLUSH, RELEASE or GETXATTR."""
    make = "for f in $(seq {count}); do echo x > d/{name}$f; done"
    # At its first OPEN the kernel learns that it need not ask, and so sends no RELEASE from then on.
    await vm.exec("mkdir d; " + make.format(count=5, name="a") + "; cat d/a1", check=True)
    asked.clear()

    await vm.exec(make.format(count=100, name="f"), check=True)

    assert asked["CREATE"] == asked["WRITE"] == 100
    assert set(asked) <= {"LOOKUP", "CREATE", "WRITE", "GETATTR"}
    assert asked.total() <= 4 * 100 + 20


async def test_small_files_that_are_read_through_are_pushed(
    vm: Sandbox, workspace: Path, asked: Counter[str]
) -> None:
    """On a read-only mount, by a thread of the agent that tells the kernel what it has not asked for.

    How many depends on which is quicker, that thread or the program: 30 to 190 of 300 were asked for.
    """
    for number in range(300):
        (workspace / f"f{number}").write_text(f"line {number}\n")

    found = await vm.exec("grep -rh line . | sort -u | wc -l", cwd="/ro", check=True)

    assert found.stdout.strip() == "300"
    assert 0 < asked["READ"] < 300


async def test_a_large_file_is_read_in_large_pieces(
    vm: Sandbox, workspace: Path, asked: Counter[str]
) -> None:
    """The kernel reads 128 KiB ahead, until the agent tells it to read more."""
    content = os.urandom(16 << 20)
    (workspace / "big").write_bytes(content)

    read = await vm.exec("sha256sum big", check=True)
    ahead = await vm.exec(
        "cat /sys/class/bdi/$(mountpoint -d /workspace)/read_ahead_kb", check=True
    )

    assert read.stdout.split()[0] == hashlib.sha256(content).hexdigest()
    assert int(ahead.stdout) >= 1024
    assert asked["READ"] <= 2 * 16
