"""A mounted directory is a file system as programs expect one: claims of tests/support/posix_program.py, in a guest."""

import json
import os
import stat
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.waiting import PATIENCE_S

from taskvm import HostDir, Memory, Sandbox
from taskvm.fs.session import Reply, Session
from taskvm.wire.fuse import Opcode

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).parent.parent / "support" / "posix_program.py"


@pytest.fixture
async def vm(workspace: Path) -> AsyncIterator[Sandbox]:
    """A sandbox with a directory of the host and one in memory."""
    mounts = {"/workspace": HostDir(workspace), "/memory": Memory()}
    async with Sandbox.create(mounts=mounts, **GUEST) as sandbox:
        await sandbox.files.write_text("/tmp/posix_program.py", PROGRAM.read_text())
        yield sandbox


async def claims_that_fail(vm: Sandbox, root: str, user: str | None = None) -> dict[str, str]:
    done = await vm.exec(
        ["python3", "/tmp/posix_program.py", root], user=user, timeout_s=2 * PATIENCE_S, check=True
    )
    outcome = json.loads(done.stdout)
    assert len(outcome) >= 25
    return {name: reason for name, reason in outcome.items() if reason}


async def test_everything_holds_on_a_directory_of_the_host(vm: Sandbox, workspace: Path) -> None:
    """And what is left there is what the guest made: no device, no FIFO, no socket, no set-id bit, no other owner."""
    failed = await claims_that_fail(vm, "/workspace")
    left = [path.lstat() for path in workspace.rglob("*")]

    assert failed == {}
    assert len(left) > 600
    assert {stat.S_IFMT(one.st_mode) for one in left} <= {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}
    assert {one.st_uid for one in left} == {os.getuid()}
    assert not any(one.st_mode & (stat.S_ISUID | stat.S_ISGID) for one in left)
    assert (workspace / "names_of_any_bytes" / ("n" * 255)).exists()
    assert (workspace / "files_beyond_four_gigabytes" / "sparse").stat().st_size == (5 << 30) + 3


async def test_nearly_everything_holds_in_memory(vm: Sandbox) -> None:
    """Memory has no holes: every byte of a file is held, and counted."""
    failed = await claims_that_fail(vm, "/memory")

    assert set(failed) <= {"allocation_and_holes", "files_beyond_four_gigabytes"}


async def test_the_guests_root_can_use_a_mount(vm: Sandbox, workspace: Path) -> None:
    """With the host's user as the owner of all it makes."""
    done = await vm.exec(
        "mkdir made && echo text > made/file && chmod 600 made/file && cat made/file && rm -r made",
        user="root",
        cwd="/workspace",
    )

    assert (done.stdout, done.exit_code) == ("text\n", 0)
    assert list(workspace.iterdir()) == []


async def test_what_every_host_refuses_is_refused_in_the_guest(
    vm: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request for a security attribute or a terminal reaches the host, though programs cause many."""
    asked: Counter[int] = Counter()
    handle = Session.handle

    def counted(session: Session, message: memoryview) -> Reply | None:
        asked[int.from_bytes(message[4:8], "little")] += 1
        return handle(session, message)

    monkeypatch.setattr(Session, "handle", counted)
    await vm.exec(
        "for n in 1 2 3; do echo x > f$n; done; ls -l; python3 -c 'print(open(\"f1\").isatty())'",
        cwd="/workspace",
        check=True,
    )

    assert asked[Opcode.CREATE] == asked[Opcode.WRITE] == 3
    assert asked[Opcode.GETXATTR] == asked[39] == 0  # 39: FUSE_IOCTL
