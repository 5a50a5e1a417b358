"""Checkpoints: what is kept, what is fresh, what a resumed sandbox is given anew, and that the source runs on.

Covers taskvm.checkpoints.checkpoint, taskvm.checkpoints.checkpointfile, taskvm.checkpoints.saving,
taskvm.checkpoints.staging, taskvm.checkpoints.kept, taskvm.checkpoints.carried and taskvm.sync.checkpoint.
"""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.waiting import PATIENCE_S, until

from taskvm import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    HostDir,
    HostError,
    Memory,
    Provider,
    ReadOnly,
    Sandbox,
    Secret,
    UsageError,
    Wrapper,
    sync,
)
from taskvm.checkpoints.kept import forget_disks

pytestmark = pytest.mark.vm

UNIQUE = (
    "od -An -N16 -tx1 /dev/urandom; cat /etc/machine-id; hostname; cat /etc/hostname; "
    "python3 -c 'import uuid; print(uuid.uuid4())'"
)
NET = {"allow": ["api.test"], "resolve": {"api.test": "127.0.0.1"}}
COUNT = (
    "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/next; mv /dev/shm/next /dev/shm/count; "
    "echo $i; sleep 0.01; done"
)


@contextlib.asynccontextmanager
async def silent_server() -> AsyncIterator[tuple[int, list[asyncio.StreamWriter]]]:
    """A server that takes what comes and never answers: its port, and its connections."""
    held: list[asyncio.StreamWriter] = []

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        await reader.read()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], held
    finally:
        for writer in held:
            writer.close()
        server.close()


def is_forgotten(checkpoint: Checkpoint, kept: Path) -> bool:
    """Delete it, again: a neighbour who tidies up the cache may have had this directory in hand."""
    checkpoint.delete()
    return not kept.parent.exists()


async def test_a_disk_is_kept_and_everything_else_is_fresh(tmp_path: Path) -> None:
    """The recipe: install, save, resume for each task. Twice at a time, each another; the source runs on."""
    secret = Secret("API_TOKEN", value="value-7f21c0", hosts=["api.test"])
    path = tmp_path / "dev-base.qcow2"
    async with Sandbox.create(**GUEST, **NET, secrets=[secret], env={"MODE": "base"}) as vm:
        await vm.exec(
            "echo tools > /var/tmp/tools; echo temporary > /dev/shm/temporary", check=True
        )
        await vm.exec("echo r > /root/of-root; echo t > /tmp/of-tmp", check=True, user="root")
        running = await vm.spawn(COUNT)
        checkpoint = await vm.checkpoint(path)
        await vm.exec("echo later > /var/tmp/later", check=True)
        await running.kill_all()
        source = (await vm.exec(UNIQUE)).stdout, vm.placeholders["API_TOKEN"]

    async with (
        checkpoint.resume(**NET, secrets=[secret]) as one,
        Checkpoint.load(path).resume(mounts={"/workspace": HostDir(tmp_path, mode="ro")}) as two,
    ):
        kept = await one.exec("ls /var/tmp /dev/shm; echo [$MODE]; pgrep -f count")
        home = await one.exec("cat /root/of-root /tmp/of-tmp", user="root")
        seen = [(await sandbox.exec(UNIQUE)).stdout for sandbox in (one, two)]
        placeholders = [one.placeholders["API_TOKEN"], *two.placeholders.values()]
        mounted = await two.exec("ls /workspace")

    assert kept.stdout == "/dev/shm:\n\n/var/tmp:\ntools\n[]\n"
    assert home.stdout == "r\nt\n"
    lines = [text.splitlines() for text in (source[0], *seen)]
    assert all(len(set(column)) == 3 for column in zip(*lines, strict=True))
    assert len({*placeholders, source[1]}) == 2
    assert mounted.stdout == "dev-base.qcow2\n"
    assert not checkpoint.memory
    assert (checkpoint.cpus, checkpoint.memory_mib) == (GUEST["cpus"], GUEST["memory_mib"])


async def test_a_checkpoint_of_a_checkpoint_holds_both(tmp_path: Path) -> None:
    """It is one file above the image, and needs no other."""
    async with Sandbox.create(**GUEST) as vm:
        await vm.exec("echo one > /var/tmp/one", check=True)
        first = await vm.checkpoint(tmp_path / "first.qcow2", stop=True)
        assert vm.state == "closed"
    async with first.resume() as vm:
        await vm.exec("rm /var/tmp/one; echo two > /var/tmp/two; mkdir /var/tmp/dir", check=True)
        second = await vm.checkpoint(tmp_path / "second.qcow2")
    first.delete()

    async with Sandbox.create(checkpoint=second, warm=False, **GUEST) as vm:
        listing = await vm.exec("ls /var/tmp")

    assert listing.stdout == "dir\ntwo\n"


async def test_programs_go_on_where_they_were_saved(tmp_path: Path) -> None:
    """Memory and disk are of one instant; identity and clock are new; who was connected learns that it is over."""
    secret = Secret("API_TOKEN", value="value-7f21c0", hosts=["api.test"])
    async with silent_server() as (port, connections):
        net = {**NET, "allow_addresses": [f"127.0.0.1:{port}"], "secrets": [secret]}
        async with Sandbox.create(**GUEST, **net) as vm:
            counting = await vm.spawn(COUNT)
            asking = await vm.spawn(
                f"curl -s http://api.test:{port}/; echo curl $? > /dev/shm/curl; sleep 600"
            )
            token, table = vm.placeholders["API_TOKEN"], "getent hosts api.test"
            before = (
                await vm.exec(f"{UNIQUE}; {table}; sha256sum < /etc/ssl/certs/ca-certificates.crt")
            ).stdout
            await vm.exec("until test -s /dev/shm/count; do sleep 0.1; done", timeout_s=PATIENCE_S)
            await until(lambda: connections)
            checkpoint = await vm.checkpoint(tmp_path / "memory", memory=True)
            at = int((await vm.exec("cat /dev/shm/count; ls /dev/shm/curl")).stdout)
            await counting.kill_all()
            await asking.kill_all()

        began = time.time()
        async with checkpoint.resume(**net) as one, checkpoint.resume(**net) as two:
            first = int((await one.exec("cat /dev/shm/count")).stdout)
            seen = (
                await one.exec(f"{UNIQUE}; {table}; sha256sum < /etc/ssl/certs/ca-certificates.crt")
            ).stdout
            other = (await two.exec(UNIQUE)).stdout
            clock = float((await one.exec(["date", "+%s.%N"])).stdout)
            await one.exec("until test -s /dev/shm/curl; do sleep 0.1; done", timeout_s=PATIENCE_S)
            curl = (await one.exec("cat /dev/shm/curl")).stdout
            goes_on = f"until test $(cat /dev/shm/count) -gt {first}; do sleep 0.05; done"
            later = await one.exec(goes_on, timeout_s=PATIENCE_S)
            names = one.placeholders

    assert 0 < first <= at + 100_000
    assert later.ok
    assert (names, curl) == ({"API_TOKEN": token}, "curl 56\n")
    pairs = [*zip(before.splitlines(), seen.splitlines(), strict=True)]
    assert [old == new for old, new in pairs] == [False] * 5 + [True] * 2
    assert not {*seen.splitlines()[:5]} & {*other.splitlines()}
    assert began <= clock <= time.time() + 1


async def test_a_program_that_writes_much_goes_on_too(tmp_path: Path) -> None:
    """Nobody reads its output any more, so nothing that it writes may stop it; a finished one is gone."""
    writes = (
        "i=0; while :; do i=$((i+1)); head -c 1M /dev/zero; echo $i > /dev/shm/next; "
        "mv /dev/shm/next /dev/shm/count; done"
    )
    async with Sandbox.create(**GUEST) as vm:
        process = await vm.spawn(writes)  # unread: it stops when its window is full
        await vm.exec("sleep 0.3; echo 0 > /dev/shm/count")
        checkpoint = await vm.checkpoint(tmp_path / "memory", memory=True)
        await process.kill_all()

    async with checkpoint.resume() as vm:
        done = await vm.exec(
            "until test $(cat /dev/shm/count) -gt 3; do sleep 0.05; done", timeout_s=PATIENCE_S
        )

    assert done.ok


async def test_programs_write_on_to_a_mounted_directory(
    tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that were open, and directories that were stood in, are the host's; what the host did meanwhile is seen."""
    writes = (
        "cd sub && exec 3>>log && for i in $(seq 200); do echo $i >&3; sleep 0.01; "
        "test $i != 50 || until test -e /dev/shm/go; do sleep 0.02; done; done; pwd > end"
    )
    (workspace / "sub").mkdir()
    mounts = {"/workspace": HostDir(workspace), "/seen": HostDir(workspace, mode="review")}
    mounts["/memory"] = Memory()
    async with Sandbox.create(mounts=mounts, **GUEST) as vm:
        await vm.spawn(writes)
        await vm.exec("echo guest > both; echo mine > /seen/sub/mine; cat both > /dev/null")
        await vm.exec("echo of the guest > /memory/kept", check=True)
        await vm.exec(
            "until grep -qx 50 sub/log; do sleep 0.02; done", check=True, timeout_s=PATIENCE_S
        )
        with monkeypatch.context() as patch:
            patch.setattr("taskvm.checkpoints.checkpointfile.MAX_MEMORY_JSON_BYTES", 512)
            with pytest.raises(CheckpointError, match="remembers more files of its mounts"):
                await vm.checkpoint(tmp_path / "memory", memory=True)
        checkpoint = await vm.checkpoint(tmp_path / "memory", memory=True, stop=True)
    saved = (workspace / "sub" / "log").read_text()
    (workspace / "both").write_text("host, meanwhile\n")

    again = {**mounts, "/workspace": HostDir(workspace)}
    for wrong, message in (
        ({}, "/memory, /seen, /workspace is missing"),
        ({**again, "/seen": HostDir(workspace, mode="ro")}, "/seen was mounted review, not ro"),
    ):
        with pytest.raises(UsageError, match=message):
            await checkpoint.resume(mounts=wrong)
    async with checkpoint.resume(mounts=again) as vm:
        both = await vm.exec(
            "cat both /memory/kept; touch /dev/shm/go; until test -s sub/end; do sleep 0.05; done",
            timeout_s=PATIENCE_S,
        )
        with await vm.changes("/seen") as changes:
            reviewed = {each.path: each.kind for each in changes}
    async with checkpoint.resume(
        mounts=again | {"/workspace": HostDir(workspace, mode="ro")}
    ) as vm:
        readable = await vm.exec("cat both; touch /workspace/new")

    assert saved == "".join(f"{number}\n" for number in range(1, 51))
    assert (workspace / "sub" / "log").read_text() == "".join(f"{n}\n" for n in range(1, 201))
    assert (workspace / "sub" / "end").read_text() == "/workspace/sub\n"
    assert both.stdout == "host, meanwhile\nof the guest\n"
    assert readable.stdout == "host, meanwhile\n"
    assert "Read-only file system" in readable.stderr
    assert reviewed == {"sub/mine": "added"}
    assert not (workspace / "sub" / "mine").exists()


class Forgetful(Wrapper):
    """Of somebody who did not think of saved guests."""

    export_state = Provider.export_state


async def test_what_cannot_be_saved_is_refused_with_the_reason(
    tmp_path: Path, workspace: Path
) -> None:
    """A name that is taken, a path that the guest may write to, no directory, a mount that nobody can serve on."""
    mounts = {"/workspace": HostDir(workspace), "/m": ReadOnly(Forgetful(Memory()))}
    async with Sandbox.create(mounts=mounts, **GUEST) as vm:
        with pytest.raises(UsageError, match="save the mount /m: ReadOnly cannot be taken up"):
            await vm.checkpoint(tmp_path / "memory", memory=True)
        with pytest.raises(UsageError, match="the guest may write to it"):
            await vm.checkpoint(workspace / "x.qcow2")
        with pytest.raises(CheckpointError, match="No such file or directory"):
            await vm.checkpoint(tmp_path / "missing" / "x.qcow2")
        with pytest.raises(UsageError, match="a name has letters"):
            await vm.checkpoint(".hidden")
        (tmp_path / "taken").touch()
        with pytest.raises(CheckpointError, match="it is there already"):
            await vm.checkpoint(tmp_path / "taken")
        alive = await vm.exec("echo fine > /workspace/fine")

    assert alive.ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "workspace"]


def test_the_blocking_surface_saves_and_resumes_too() -> None:
    """By name, in the store."""
    with sync.Sandbox.create(**GUEST) as vm:
        vm.exec("echo saved > /dev/shm/saved", check=True)
        vm.checkpoint("blocking", memory=True, stop=True)

    with sync.Checkpoint.load("blocking").resume() as vm:
        said = vm.exec("cat /dev/shm/saved").stdout
    stored = [(each.name, each.memory) for each in CheckpointStore().list()]
    CheckpointStore().remove("blocking")

    assert said == "saved\n"
    assert stored == [("blocking", True)]
    with pytest.raises(CheckpointError, match="it is not there"):
        CheckpointStore().get("blocking")


async def test_a_sandbox_outlives_the_checkpoint_that_it_runs_from(tmp_path: Path) -> None:
    """Its checkpoint is removed, and another is saved under that name: it is saved and copied with what it had."""
    read = "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /var/tmp/data; cat /var/tmp/data | wc -c"
    make = "head -c 3M /dev/urandom > /var/tmp/data; sync"
    async with Sandbox.create(**GUEST) as vm:
        await vm.exec(make, check=True)
        right = (await vm.exec(read, check=True)).stdout
        await vm.checkpoint("base")
        memory = await vm.checkpoint(tmp_path / "memory", memory=True)
        async with Checkpoint.load("base").resume() as one, memory.resume() as two:
            CheckpointStore().remove("base")
            memory.delete()
            await vm.exec(make, check=True)
            await vm.checkpoint("base")
            said = []
            for number, source in enumerate((one, two)):
                async with source.fork() as child, child.fork() as grandchild:
                    said += [(await each.exec(read)).stdout for each in (child, grandchild)]
                saved = await source.checkpoint(tmp_path / f"again{number}")
                async with saved.resume() as again:
                    said.append((await again.exec(read)).stdout)
    CheckpointStore().remove("base")

    assert right.endswith(" -\n3145728\n")
    assert said == [right] * 6


async def test_what_is_kept_of_a_removed_checkpoint_goes_with_its_last_sandbox(
    tmp_path: Path,
) -> None:
    """A link of its own costs nothing while the checkpoint is there, and no space is lost afterwards."""
    async with Sandbox.create(**GUEST) as vm:
        saved = await vm.checkpoint(tmp_path / "base", stop=True)
    async with saved.resume() as vm:
        (kept,) = (layer for layer in vm._guest.origin.files.layers)
        assert kept.samefile(saved.path)
        saved.delete()
        assert kept.exists()

    await until(lambda: is_forgotten(saved, kept))


async def test_a_checkpoint_of_ones_own_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest was computed a moment ago: neither the first start reads gigabytes, nor a later one."""

    def digest(*_arguments: object) -> str:
        raise AssertionError("it was read")

    async with Sandbox.create(**GUEST) as vm:
        disk = await vm.checkpoint(tmp_path / "disk")
        memory = await vm.checkpoint(tmp_path / "memory", memory=True)
    with monkeypatch.context() as patch:
        patch.setattr("taskvm.checkpoints.checkpointfile._digest", digest)
        for checkpoint in (memory, disk, memory, disk):
            async with checkpoint.resume() as vm:
                assert (await vm.exec("true")).ok


async def test_a_checkpoint_on_another_file_system_is_copied_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No link leads there: a sandbox runs from a copy, which has been verified and goes with its checkpoint."""
    async with Sandbox.create(**GUEST) as vm:
        await vm.exec("echo kept > /var/tmp/kept", check=True)
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            checkpoint = await vm.checkpoint(f"{name}/disk")
            with monkeypatch.context() as patch:
                patch.setattr("taskvm.launch.check_free_space", lambda *_: None)
                with pytest.raises(HostError, match="must remain"):
                    await checkpoint.resume(free_disk_mib=1 << 40)
            async with checkpoint.resume() as one:
                (kept,) = one._guest.origin.files.layers
            inode = kept.stat().st_ino
            (kept.parent / ".killed").touch()
            await until(lambda: not (list(forget_disks()) or (kept.parent / ".killed").exists()))
            async with checkpoint.resume() as two:
                said = (await two.exec("cat /var/tmp/kept")).stdout
                again = kept.stat().st_ino
                checkpoint.delete()
                async with two.fork() as child:
                    copied = (await child.exec("cat /var/tmp/kept")).stdout

            await until(lambda: is_forgotten(checkpoint, kept))

    assert (said, copied, again) == ("kept\n", "kept\n", inode)


async def test_a_full_disk_costs_the_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether that is seen before anything is written or in the middle; nothing is left there."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", small]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("this user may not mount a small file system to fill")
    try:
        async with Sandbox.create(**GUEST) as vm:
            depth = len(vm._guest.layers.disk.layers)
            await vm.exec("head -c 4M /dev/urandom > /var/tmp/data", check=True)
            for memory in (False, True):
                with pytest.raises(HostError, match="Free disk space"):
                    await vm.checkpoint(small / "x", memory=memory)
            with monkeypatch.context() as patch:
                patch.setattr("taskvm.vm.disk.check_room", lambda *_: None)
                with pytest.raises(HostError, match="No space left on device"):
                    await vm.checkpoint(small / "x")
            left = list(small.iterdir())
            await vm.checkpoint("fine")
        with pytest.raises(HostError, match="Free disk space"):
            CheckpointStore().export("fine", small / "x")
        monkeypatch.setattr("taskvm.checkpoints.saving.check_room", lambda *_: None)
        with pytest.raises(CheckpointError, match="No space left on device"):
            CheckpointStore().export("fine", small / "x")
        CheckpointStore().remove("fine")
        left += small.iterdir()
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)

    assert (left, len(vm._guest.layers.disk.layers)) == ([], depth)


async def test_what_would_leave_too_little_of_the_hosts_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint or a fork that crosses the floor would end every sandbox; it is an error, and they run on."""
    async with Sandbox.create(**GUEST, free_disk_mib=0) as vm:
        await vm.exec("head -c 4M /dev/urandom > /var/tmp/data", check=True)
        monkeypatch.setattr(vm._guest, "_free_disk_mib", 1 << 40)
        for memory in (False, True):
            with pytest.raises(HostError, match="must remain"):
                await vm.checkpoint(vm._guest.directory / "x", memory=memory)
        with pytest.raises(HostError, match="must remain"):
            await vm.fork()
        alive = await vm.exec("echo alive")

    assert alive.stdout == "alive\n"


KILLED = """
import asyncio, pathlib, sys, time
import taskvm, taskvm.checkpoints.saving as saving

def flatten(disk, path, **_):
    path.write_bytes(b"half")
    print("saving", flush=True)
    time.sleep(600)

async def main():
    saving.flatten = flatten
    async with taskvm.Sandbox.create(cpus=1, memory_mib=256) as vm:
        await vm.checkpoint(sys.argv[1], memory=True)

asyncio.run(main())
"""


def test_what_a_killed_process_was_saving_is_removed(tmp_path: Path) -> None:
    """In the store when it is listed, beside a path when that is saved again; what others are making stays."""
    targets = ["killed", str(tmp_path / "killed")]
    for target in targets:
        command = [sys.executable, "-c", KILLED, target]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"saving\n"
            beneath = CheckpointStore().root if target == "killed" else tmp_path
            assert [path.name for path in beneath.glob(".killed.*")] != []
            list(CheckpointStore().list())
            held = [path.name for path in beneath.glob(".killed.*")]
            process.kill()
        assert held != []

    list(CheckpointStore().list())
    (tmp_path / ".killed.12345678").mkdir()
    (tmp_path / ".killed.12345678" / "mine").touch()
    with sync.Sandbox.create(**GUEST) as vm:
        vm.checkpoint(tmp_path / "killed")

    assert list(CheckpointStore().root.glob(".*")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".killed.12345678", "killed"]


def test_a_name_with_a_dot_is_a_name(tmp_path: Path) -> None:
    """It is listed as it was given, and found so."""
    with sync.Sandbox.create(**GUEST) as vm:
        saved = vm.checkpoint("python-3.11")
        beside = vm.checkpoint(tmp_path / "base.qcow2")
    store = CheckpointStore()
    names = [each.name for each in store.list()]
    store.remove("python-3.11")

    assert (saved.name, beside.name) == ("python-3.11", "base.qcow2")
    assert "python-3.11" in names
    assert "python-3.11" not in store.names()
