"""Running machines whose disk and memory are saved at one instant.

Covers taskvm.vm.snapshot, taskvm.vm.memory, taskvm.vm.layers and taskvm.vm.disk.
"""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import tempfile
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.waiting import PATIENCE_S

from taskvm import Sandbox, SandboxLostError
from taskvm.fs.server import FsServer
from taskvm.vm.command import disk_beneath
from taskvm.vm.disk import flatten, read_header
from taskvm.vm.machine import Machine
from taskvm.vm.memory import MemoryCopy
from taskvm.vm.snapshot import save_disk, save_machine

pytestmark = pytest.mark.vm


async def test_a_disk_is_cut_and_its_layers_merged_again(tmp_path: Path) -> None:
    """Three times: the guest runs on, its disk keeps all, and has no more layers than at first."""
    async with Sandbox.create(**GUEST) as vm:
        guest = vm._guest
        before = guest.layers.disk
        for number in range(3):
            await vm.exec(f"echo {number} >> /var/tmp/log")
            async with guest.watch.kept_awake():
                cut = await save_disk(guest.machine, guest.layers, guest.at_rest)
                flatten(cut.disk, tmp_path / f"{number}.qcow2")
                await guest.layers.merge()
        log = await vm.exec(
            "cat /var/tmp/log; sync; echo 3 > /proc/sys/vm/drop_caches; cat /var/tmp/log"
        )

    assert log.stdout == "0\n1\n2\n" * 2
    assert guest.layers.disk == before
    assert b"0\n1\n2\n" in (tmp_path / "2.qcow2").read_bytes()
    assert b"0\n1\n2\n" not in (tmp_path / "1.qcow2").read_bytes()
    assert not read_header(tmp_path / "2.qcow2").names_backing


@pytest.mark.parametrize(
    "load", ["true", "while :; do head -c 40M /dev/urandom > /dev/shm/x; done"]
)
async def test_a_machine_is_saved_while_it_runs(tmp_path: Path, load: str) -> None:
    """An idle guest, and one that dirties memory all the time: both are saved, and run on."""
    async with Sandbox.create(**GUEST) as vm:
        guest = vm._guest
        process = await vm.spawn(load)
        async with guest.watch.kept_awake():
            cut = await save_machine(guest.machine, guest.layers, guest.at_rest, tmp_path)
        answer = await vm.exec(["echo", "still here"])
        await process.kill_all()

    assert answer.stdout == "still here\n"
    assert (tmp_path / "ram").stat().st_size == GUEST["memory_mib"] << 20
    assert (tmp_path / "state").stat().st_size > 100_000
    assert cut.disk.layers[0].name == "disk.qcow2"


@pytest.mark.parametrize("origin", ["a template", "a sandbox", "a boot"])
async def test_the_copy_of_a_memory_is_right_to_the_byte(
    tmp_path: Path, origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the guest writes all the time, and the file that its memory lies above may have no name any more."""
    # A ping would be written into the memory of a stopped guest, before it is compared.
    monkeypatch.setattr("taskvm.watch.HEARTBEAT_S", 1e6)
    async with AsyncExitStack() as stack:
        vm = await stack.enter_async_context(Sandbox.create(**GUEST, warm=(origin != "a boot")))
        await vm.spawn("while :; do head -c 20M /dev/urandom > /dev/shm/x; done")
        if origin == "a sandbox":
            vm = await stack.enter_async_context(vm.fork())
        machine, watch = vm._guest.machine, vm._guest.watch
        async with watch.kept_awake():
            with closing(await MemoryCopy.begin(machine, tmp_path / "ram")) as copy:
                await machine.execute("stop")
                await copy.update()
                right = hash_memory(machine.qemu_pid, copy.start, GUEST["memory_mib"] << 20)
                await machine.execute("cont")
        alive = await vm.exec("echo alive")

    assert hashlib.sha256((tmp_path / "ram").read_bytes()).hexdigest() == right
    assert alive.stdout == "alive\n"


def hash_memory(process: int, start: int, size: int) -> str:
    """The digest of a part of the memory of another process, every page of it read."""
    digest = hashlib.sha256()
    with Path(f"/proc/{process}/mem").open("rb", buffering=0) as memory:
        memory.seek(start)
        while size:
            piece = memory.read(min(size, 1 << 20))
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()


async def test_the_memory_of_a_machine_that_was_booted_is_saved_too(tmp_path: Path) -> None:
    """It has no template: its memory is anonymous, and all of it is QEMU's own."""
    async with Sandbox.create(**GUEST, warm=False) as vm:
        await vm.exec("echo kept > /dev/shm/kept", check=True)
        async with vm.fork() as child, child.fork() as grandchild:
            said = await grandchild.exec("cat /dev/shm/kept")

    assert said.stdout == "kept\n"


async def test_a_sandbox_is_saved_to_another_file_system() -> None:
    """Where nothing can be shared with the cache's: with memory, and its disk alone."""
    async with Sandbox.create(**GUEST) as vm:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            await vm.exec("echo kept | tee /var/tmp/kept > /dev/shm/kept", check=True)
            disk = await vm.checkpoint(f"{name}/disk")
            memory = await vm.checkpoint(f"{name}/memory", memory=True)
            async with memory.resume() as resumed:
                said = await resumed.exec("cat /var/tmp/kept /dev/shm/kept")
            content = disk.path.read_bytes()

    assert said.stdout == "kept\nkept\n"
    assert b"kept\n" in content


@pytest.mark.parametrize(
    "command",
    [
        "blockdev-add",
        "stop",
        "blockdev-snapshot",
        "cont",
        "block-commit",
        "block-job-complete",
        "blockdev-del",
    ],
)
async def test_a_save_that_is_cancelled_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """After any step: the disk is as deep as before, holds all, and what is saved next is right."""
    async with Sandbox.create(**GUEST) as vm, asyncio.TaskGroup() as group:
        guest = vm._guest
        before, execute = guest.layers.disk, guest.machine.execute
        await vm.exec("echo of-the-first-save > /var/tmp/one", check=True)

        async def cancelling(name: str, **arguments: object) -> object:
            answer = await execute(name, **arguments)
            if name == command:
                saving.cancel()
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(guest.machine, "execute", cancelling)
            saving = group.create_task(vm.checkpoint(tmp_path / "one"))
            await asyncio.wait([saving])
        left = list(tmp_path.iterdir())
        await vm.exec("echo of-the-second-save > /var/tmp/two", check=True)
        second = await vm.checkpoint(tmp_path / "two")
        read = "echo 3 > /proc/sys/vm/drop_caches; cat /var/tmp/one /var/tmp/two"
        said = await vm.exec(read)

    content = second.path.read_bytes()
    assert saving.cancelled()
    assert (left, guest.layers.disk) == ([], before)
    assert said.stdout == "of-the-first-save\nof-the-second-save\n"
    assert b"of-the-first-save\n" in content
    assert b"of-the-second-save\n" in content


async def test_a_virtual_machine_that_ends_while_layers_are_merged_is_lost_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the event of a QEMU that is no more."""
    async with Sandbox.create(**GUEST) as vm:
        machine = vm._guest.machine
        execute = machine.execute

        async def killing(name: str, **arguments: object) -> object:
            answer = await execute(name, **arguments)
            if name == "block-commit":
                os.kill(machine.qemu_pid, signal.SIGKILL)
            return answer

        monkeypatch.setattr(machine, "execute", killing)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(SandboxLostError, match="SIGKILL"):
                await vm.checkpoint(tmp_path / "never")

    assert list(tmp_path.iterdir()) == []


async def test_a_merge_that_fails_costs_a_layer_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that is too slow or has no room: what was saved is saved, and the next save works."""
    execute = Machine.execute

    async def never_completed(machine: Machine, name: str, **arguments: object) -> object:
        return None if name == "block-job-complete" else await execute(machine, name, **arguments)

    async with Sandbox.create(**GUEST) as vm:
        depth = len(vm._guest.layers.disk.layers)
        await vm.exec("echo kept-one > /var/tmp/one", check=True)
        with monkeypatch.context() as patch:
            patch.setattr("taskvm.vm.layers.MERGE_TIMEOUT_S", 0.0)
            patch.setattr(Machine, "execute", never_completed)
            first = await vm.checkpoint(tmp_path / "one")
        deeper = len(vm._guest.layers.disk.layers)
        await vm.exec("echo kept-two > /var/tmp/two", check=True)
        second = await vm.checkpoint(tmp_path / "two")
        monkeypatch.setattr("taskvm.vm.layers.MAX_LAYERS", depth + 1)
        await vm.checkpoint(tmp_path / "three")
        said = await vm.exec("echo 3 > /proc/sys/vm/drop_caches; cat /var/tmp/one /var/tmp/two")
        merged = len(vm._guest.layers.disk.layers)

    assert b"kept-one\n" in first.path.read_bytes()
    assert b"kept-two\n" in second.path.read_bytes()
    assert (deeper, merged) == (depth + 1, depth)
    assert said.stdout == "kept-one\nkept-two\n"


@pytest.mark.parametrize(
    ("command", "timeout_s"), [("block-job-cancel", 0.0), ("block-job-complete", 0.2)]
)
async def test_a_merge_that_ends_while_it_is_given_up_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, timeout_s: float
) -> None:
    """QEMU is told to stop a merge that has become ready, and one that has ended by itself."""
    execute = Machine.execute

    async def slow(machine: Machine, name: str, **arguments: object) -> object:
        waits = 0.5 if name == command else 0.0
        if name == "block-job-cancel":  # the merge is ready by now
            await asyncio.sleep(waits)
            return await execute(machine, name, **arguments)
        answer = await execute(machine, name, **arguments)
        await asyncio.sleep(waits)  # the merge has ended by now
        return answer

    async with Sandbox.create(**GUEST) as vm:
        depth = len(vm._guest.layers.disk.layers)
        await vm.exec("echo kept-one > /var/tmp/one", check=True)
        with monkeypatch.context() as patch:
            patch.setattr("taskvm.vm.layers.MERGE_TIMEOUT_S", timeout_s)
            patch.setattr(Machine, "execute", slow)
            first = await vm.checkpoint(tmp_path / "one")
        monkeypatch.setattr("taskvm.vm.layers.MAX_LAYERS", depth + 1)
        await vm.checkpoint(tmp_path / "two")
        said = await vm.exec("echo 3 > /proc/sys/vm/drop_caches; cat /var/tmp/one")
        merged = len(vm._guest.layers.disk.layers)

    assert b"kept-one\n" in first.path.read_bytes()
    assert (said.stdout, merged) == ("kept-one\n", depth)


async def test_a_guest_whose_mounts_do_not_go_on_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file system port takes no frame any more: what is asked of it fails, and waits for nobody."""

    def never(_server: FsServer) -> None:
        raise TimeoutError("the guest reads nothing")

    async with Sandbox.create(**GUEST) as vm:
        monkeypatch.setattr(FsServer, "resume", never)
        with suppress(SandboxLostError):  # it may be saved before the end is there
            await vm.checkpoint(tmp_path / "saved")

        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(SandboxLostError, match="the guest reads nothing"):
                await vm.exec(["true"])


async def test_a_disk_that_is_cut_while_it_is_written_is_a_sound_file_system(
    tmp_path: Path,
) -> None:
    """It has no journal: what programs had written when they were frozen is written back before the cut."""
    churn = "while :; do cp -r /etc /var/tmp/$RANDOM; rm -rf /var/tmp/1*; done"
    async with Sandbox.create(**GUEST) as vm:
        guest = vm._guest
        churning = await vm.spawn(churn)
        await asyncio.sleep(2)
        async with guest.watch.kept_awake():
            cut = await save_disk(guest.machine, guest.layers, guest.at_rest)
            flatten(cut.disk, tmp_path / "flat")
            await guest.layers.merge()
        await churning.kill_all()
        base = guest.layers.disk.base

    node = json.dumps(disk_beneath([tmp_path / "flat"], base))
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", f"json:{node}", raw], check=True)
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    checked = subprocess.run(
        ["e2fsck", "-fn", raw], env=environment, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
