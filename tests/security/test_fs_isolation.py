"""A mount whose provider hangs, and a real guest: other mounts, commands and files go on, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.second_actor import fingerprint, swapping
from tests.support.waiting import PATIENCE_S, until

from taskvm import GuestError, HostDir, PathProvider, Sandbox
from taskvm.fs.pathprovider import PathStat

pytestmark = pytest.mark.vm

CANARY = "CANARY-of-the-host"


class Hanging(PathProvider):
    """Plain Python of a user's: reading the file `stuck` takes as long as it is not allowed."""

    lifetime_s = 0.0  # the guest asks each time

    def __init__(self) -> None:
        self.allowed = threading.Event()
        self.asked = threading.Event()
        self.patience = [PATIENCE_S]  # shared by what serves the mounts, which are copies

    @property
    def request_deadline_s(self) -> float:  # type: ignore[override]  # it changes
        return self.patience[0]

    def stat(self, path: str) -> PathStat:
        if path not in ("/", "/stuck", "/other"):
            raise FileNotFoundError(path)
        return PathStat(directory=path == "/", size=6)

    def list(self, path: str) -> list[str]:
        return ["stuck", "other"]

    def read_file(self, path: str, offset: int, size: int) -> bytes:
        if path == "/stuck":
            self.asked.set()
            self.allowed.wait(PATIENCE_S)
        return b"bytes\n"[offset : offset + size]


async def test_a_mount_that_hangs_holds_up_nothing_else(tmp_path: Path) -> None:
    """And who does wait for it is told so in the end."""
    slow = Hanging()
    mounts = {"/slow": slow, "/fast": HostDir(tmp_path)}
    async with Sandbox.create(mounts=mounts, **GUEST) as vm, asyncio.TaskGroup() as tasks:
        waiting = [
            tasks.create_task(vm.exec(["cat", "/slow/stuck"])),
            *(tasks.create_task(_read(vm, "/slow/other")) for _ in range(3)),
        ]
        await until(slow.asked.is_set)

        done = await vm.exec("echo one > /fast/file && sync /fast/file && cat /fast/file && ls /")
        await vm.files.write_bytes("/fast/other", b"two")
        read = await vm.files.read_bytes("/fast/file")
        still = not waiting[0].done()
        slow.allowed.set()

    assert (done.exit_code, done.stdout.splitlines()[0], read, still) == (0, "one", b"one\n", True)
    assert (tmp_path / "other").read_bytes() == b"two"
    assert waiting[0].result().stdout == "bytes\n"
    assert [task.result() for task in waiting[1:]] == [b"bytes\n"] * 3


async def test_a_mount_that_never_answers_is_an_error_and_no_obstacle(tmp_path: Path) -> None:
    """Programs, file operations and the end of the sandbox."""
    slow = Hanging()
    async with Sandbox.create(mounts={"/slow": slow, "/fast": HostDir(tmp_path)}, **GUEST) as vm:
        assert (await vm.exec(["cat", "/slow/other"])).stdout == "bytes\n"
        slow.patience[0] = 0.2
        refused = await vm.exec(["cat", "/slow/stuck"])
        with pytest.raises(GuestError, match="timed out"):
            await vm.files.read_bytes("/slow/other")
        done = await vm.exec("echo one > /fast/file")

    assert "timed out" in refused.stderr
    assert done.exit_code == 0
    assert (tmp_path / "file").read_text() == "one\n"
    slow.allowed.set()


async def _read(vm: Sandbox, path: str) -> bytes:
    return await vm.files.read_bytes(path)


ATTACK = """
import os, shutil
os.chdir("/workspace")
seen = set()
def read(path):
    with open(path) as file:
        seen.add(file.read())
def write(path):
    with open(path, "a") as file:
        file.write("guest")
rounds = 0
while rounds < 20 or not seen - {""}:
    rounds += 1
    for act in (
        lambda: read("shown/inner"), lambda: read("shown/sub/inner"),
        lambda: seen.update(os.listdir("shown")), lambda: write("shown/inner"), lambda: write("shown/new"),
        lambda: os.truncate("shown/sub/inner", 3), lambda: os.chmod("shown/sub", 0o777),
        lambda: os.utime("shown/inner", (1, 1)), lambda: os.setxattr("shown/inner", "user.guest", b"1"),
        lambda: os.mkdir("shown/made"), lambda: os.rename("shown/inner", "shown/moved"),
        lambda: os.rename("shown/moved", "shown/inner"), lambda: os.link("shown/inner", "shown/sub/linked"),
        lambda: os.symlink("../inner", "shown/sub/way"), lambda: read("shown/sub/way"),
        lambda: os.unlink("shown/sub/linked"), lambda: os.unlink("shown/sub/way"), lambda: os.rmdir("shown/made"),
        lambda: os.unlink("shown/new"),
    ):
        try:
            act()
        except OSError:
            pass
print(seen)
"""


async def test_a_second_actor_on_the_host_gains_the_guest_nothing(tmp_path: Path) -> None:
    """Ordinary programs, as root of the guest, on a directory that becomes a link to the host's secrets and back."""
    outside = tmp_path / "outside"
    for directory in (outside, tmp_path / "share" / "shown"):
        (directory / "sub").mkdir(parents=True)
        for name in ("inner", "sub/inner"):
            (directory / name).write_text("workspace\n" if directory != outside else CANARY)
    (tmp_path / "share" / "trap").symlink_to(outside)
    before = fingerprint(outside)

    async with Sandbox.create(mounts={"/workspace": HostDir(tmp_path / "share")}, **GUEST) as vm:
        with swapping(tmp_path / "share" / "shown", tmp_path / "share" / "trap"):
            done = await vm.exec(["python3", "-c", ATTACK], user="root")

    assert "inner" in done.stdout or "workspace" in done.stdout or "guest" in done.stdout
    assert CANARY not in done.stdout
    assert fingerprint(outside) == before
