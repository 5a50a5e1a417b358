"""Forks: independent copies of a running sandbox, each with an identity, a policy and secrets of its own.

Covers taskvm.checkpoints.forking.
"""

import asyncio
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.conftest import GUEST
from tests.support.processes import qemu_of
from tests.support.waiting import PATIENCE_S, until, wait_until

from taskvm import (
    HostDir,
    HostError,
    Memory,
    Policy,
    Sandbox,
    SandboxLostError,
    SandboxStateError,
    Secret,
    Shadow,
    TaskvmError,
    UsageError,
    sync,
)
from taskvm.checkpoints.forking import _start_all
from taskvm.guest import Guest
from taskvm.launch import _linked
from taskvm.vm.command import Disk
from taskvm.vm.disk import create_layer
from taskvm.vm.layers import MAX_LAYERS

pytestmark = pytest.mark.vm

EXAMPLES = Path(__file__).parents[2] / "examples"
UNIQUE = "od -An -N16 -tx1 /dev/urandom; cat /etc/machine-id; hostname"
MODES: tuple[Literal["ro", "direct"], ...] = ("ro", "direct")
COUNT = "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/next; mv /dev/shm/next /dev/shm/count; sleep 0.01; done"


async def test_copies_go_their_own_ways() -> None:
    """Memory, disk and running programs are copied; what one copy, or the original, does the others do not see."""
    async with Sandbox.create(**GUEST) as vm:
        await vm.exec("echo base > /var/tmp/base; echo base > /dev/shm/base", check=True)
        await vm.spawn(COUNT)
        await vm.exec("until test -s /dev/shm/count; do sleep 0.01; done")
        one, two = [each for each in await vm.fork_many(2) if isinstance(each, Sandbox)]
        async with one, two:
            everyone = (vm, one, two)
            for sandbox in everyone:
                await sandbox.exec(
                    f"echo {sandbox.id} | tee /var/tmp/mine > /dev/shm/mine", check=True
                )
            await two.exec("rm /var/tmp/base")
            first = [(await each.exec("cat /dev/shm/count")).stdout for each in everyone]
            said = [
                (
                    await each.exec(
                        "cat /var/tmp/mine /dev/shm/mine; ls /var/tmp /dev/shm | grep -v next"
                    )
                ).stdout
                for each in everyone
            ]
            unique = [(await each.exec(UNIQUE)).stdout.splitlines() for each in everyone]
            for each, count in zip(everyone, first, strict=True):  # everywhere it goes on
                await each.exec(
                    f"until test $(cat /dev/shm/count) -gt {int(count)}; do sleep 0.05; done",
                    check=True,
                    timeout_s=PATIENCE_S,
                )
            await vm.close()
            alone = await one.exec("cat /var/tmp/base /var/tmp/mine; sync; ls /usr/bin | wc -l")

    base = "/dev/shm:\nbase\ncount\nmine\n\n/var/tmp:\n{}mine\n"
    assert said == [
        f"{each.id}\n" * 2 + base.format("" if each is two else "base\n") for each in everyone
    ]
    assert all(len(set(column)) == 3 for column in zip(*unique, strict=True))
    assert alone.stdout.startswith(f"base\n{one.id}\n")


async def test_a_copy_has_a_policy_secrets_and_variables_of_its_own(tmp_path: Path) -> None:
    """The original's, unless others are given; a folder can be mounted in a copy; its audit log is its own."""
    secret = Secret("API_TOKEN", value="value-7f21c0", hosts=["api.test"])
    other = Secret("OTHER", value="value-83aa01", hosts=["other.test"])
    async with (
        Sandbox.create(**GUEST, allow=["api.test"], secrets=[secret], env={"A": "1"}) as vm,
        vm.fork() as same,
        vm.fork(
            allow=["other.test"], secrets=[other], env={}, mounts={"/mnt/x": HostDir(tmp_path)}
        ) as changed,
    ):
        same_env = await same.exec("echo $A $API_TOKEN")
        changed_env = await changed.exec("echo [$A] [$API_TOKEN]; touch /mnt/x/here")
        denied = await changed.exec("getent hosts api.test || echo denied")
        logs = {each.audit_path for each in (vm, same, changed)}

    assert same_env.stdout.split() == ["1", vm.placeholders["API_TOKEN"]]
    assert (changed_env.stdout, denied.stdout) == ("[] []\n", "denied\n")
    assert list(changed.placeholders) == ["OTHER"]
    assert (tmp_path / "here").exists()
    assert len(logs) == 3


async def test_each_of_many_copies_has_options_of_its_own() -> None:
    """What all are given, and what each is given besides; the limits of the original stay."""
    async with Sandbox.create(**GUEST, env={"ALL": "1"}, disk_limit_mib=77) as vm:
        started = await vm.fork_many(
            3, allow=["all.test"], each=lambda number: {"env": {"ATTEMPT": str(number)}}
        )
        said, policies, limits = [], set(), set()
        for child in started:
            assert isinstance(child, Sandbox)
            async with child:
                said.append((await child.exec("echo $ATTEMPT $ALL")).stdout)
                policies.add(child.policy)
                limits.add(child._options.limits.disk_limit_mib)

    assert said == ["0\n", "1\n", "2\n"]
    assert policies == {Policy.parse(["all.test"])}
    assert limits == {77}


async def test_a_copy_revives_nothing_that_was_narrowed_replaced_or_revoked() -> None:
    """Policy and secrets are those of the instant of the fork, not of the original's start."""
    names = ("OLD", "KEPT", "FAR")
    hosts = {"OLD": "api.test", "KEPT": "api.test", "FAR": "far.test"}
    secrets = [Secret(name, f"value-1-{name}", hosts=[hosts[name]]) for name in names]
    async with Sandbox.create(**GUEST, allow=["api.test", "far.test"], secrets=secrets) as vm:
        vm.put_secret(Secret("KEPT", "value-2-KEPT", hosts=["api.test"]))
        vm.put_secret(Secret("NEW", "value-1-NEW", hosts=["api.test"]))
        vm.revoke_secret("OLD")
        vm.change_policy(Policy.parse(["api.test"]))
        async with vm.fork() as copy:
            variables = await copy.exec('echo "$OLD$FAR-$KEPT-$NEW"')
            placeholders = copy.placeholders

            assert set(placeholders) == {"KEPT", "NEW"}
            assert copy.policy == Policy.parse(["api.test"])
            assert variables.stdout == f"-{placeholders['KEPT']}-{placeholders['NEW']}\n"


async def test_a_copy_that_cannot_start_is_its_error_and_nothing_is_left() -> None:
    """The others start; a mount that the host lacks is not the original's loss."""
    secret = Secret("API_TOKEN", value="value-7f21c0", hosts=["elsewhere.test"])
    async with Sandbox.create(**GUEST) as vm:
        (failed,) = await vm.fork_many(1, secrets=[secret])
        with pytest.raises(UsageError, match="not within the allowed hosts"):
            await vm.fork(secrets=[secret])
        with pytest.raises(UsageError, match="it must be 1 to"):
            await vm.fork_many(0)
        alive = await vm.exec("echo alive")
        left = sorted(path.name for path in vm._guest.directory.iterdir() if path.is_dir())

    assert isinstance(failed, TaskvmError)
    assert (alive.stdout, left) == ("alive\n", [])


async def test_each_copy_reviews_changes_of_its_own(tmp_path: Path) -> None:
    """It starts from its original's changes, with files that programs have open; the host has what it had."""
    (tmp_path / "note").write_text("host\n")
    (tmp_path / "kept").write_text("kept\n")
    append = "exec 3>>log; until test -e /dev/shm/go; do sleep 0.02; done; cat /dev/shm/go >&3; touch /dev/shm/done"
    mounts = {"/workspace": HostDir(tmp_path, mode="review")}
    async with Sandbox.create(mounts=mounts, **GUEST) as vm:
        await vm.exec("echo base >> note; echo base > log; rm kept", check=True)
        await vm.spawn(append)
        started = await vm.fork_many(3)
        children = [each for each in started if isinstance(each, Sandbox)]
        found = {}
        for number, child in enumerate(children):
            async with child:
                await child.exec(
                    f"echo {number} >> note; echo {number} > made{number}; "
                    f"echo {number} > /dev/shm/next; mv /dev/shm/next /dev/shm/go; "
                    "until test -e /dev/shm/done; do sleep 0.02; done",
                    check=True,
                    timeout_s=PATIENCE_S,
                )
                with await child.changes() as changes:
                    found[number] = {each.path: each.kind for each in changes}
                    contents = [changes.read(name) for name in ("note", "log")]
                assert contents == [
                    f"host\nbase\n{number}\n".encode(),
                    f"base\n{number}\n".encode(),
                ]
        with await vm.changes() as changes:
            parents = {each.path: each.kind for each in changes}

    common = {"note": "modified", "kept": "deleted", "log": "added"}
    assert parents == common
    assert found == {number: {**common, f"made{number}": "added"} for number in range(3)}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "note": "host\n",
        "kept": "kept\n",
    }


async def test_a_copy_knows_what_was_applied_and_discards_alone(tmp_path: Path) -> None:
    """What its original has put on the host is no conflict for a copy; what anybody else changed there is."""
    (tmp_path / "one").write_text("host\n")
    (tmp_path / "two").write_text("host\n")
    mounts = {"/workspace": HostDir(tmp_path, mode="review")}
    async with Sandbox.create(mounts=mounts, **GUEST) as vm:
        await vm.exec("echo a > one; echo a > two", check=True)
        with await vm.changes() as changes:
            changes.apply(["one"])
        (tmp_path / "two").write_text("edited by its owner\n")
        async with vm.fork() as between, between.fork() as child:
            await child.exec("echo b > one; echo b > two", check=True)
            with await child.changes() as changes:
                statuses = {each.path: each.status for each in changes.apply()}
            await child.discard()
            discarded = await child.exec("cat one two")
        kept = await vm.exec("cat one two")

    assert statuses == {"one": "applied", "two": "conflict"}
    assert discarded.stdout == "b\nedited by its owner\n"
    assert kept.stdout == "a\na\n"


async def test_copies_share_a_read_only_mount(tmp_path: Path) -> None:
    """A file that is open there stays open, what the host writes later is seen, and nobody writes."""
    (tmp_path / "note").write_text("one\n")
    async with Sandbox.create(mounts={"/in": HostDir(tmp_path, mode="ro")}, **GUEST) as vm:
        await vm.spawn(
            "exec 3</in/note; until test -e /dev/shm/go; do sleep 0.02; done; cat <&3 > /dev/shm/read"
        )
        await vm.exec("cat /in/note", check=True)
        async with vm.fork() as child:
            (tmp_path / "later").write_text("two\n")
            said = await child.exec(
                "touch /dev/shm/go; until test -s /dev/shm/read; do sleep 0.02; done; cat /dev/shm/read /in/later; "
                "touch /in/x 2> /dev/null || echo refused",
                timeout_s=PATIENCE_S,
            )
            own = (await vm.exec("cat /in/later")).stdout

    assert (said.stdout, own) == ("one\ntwo\nrefused\n", "two\n")


async def test_copies_that_would_share_a_writable_mount_are_refused(
    vm_with_workspace: Sandbox,
) -> None:
    with pytest.raises(SandboxStateError, match=r"write to the same mounts \(/workspace\)"):
        await vm_with_workspace.fork()


async def test_a_copy_may_read_what_its_original_writes(tmp_path: Path) -> None:
    """A program that writes goes on in the original and fails in the copy, which sees what the original writes."""
    write = (
        "exec 3>>/out/log; until test -e /dev/shm/go; do sleep 0.02; done; "
        "echo more >&3 && echo written > /dev/shm/end || echo refused > /dev/shm/end"
    )
    end = "touch /dev/shm/go; until test -s /dev/shm/end; do sleep 0.02; done; cat /dev/shm/end"
    async with Sandbox.create(mounts={"/out": HostDir(tmp_path)}, **GUEST) as vm:
        await vm.spawn(write)
        await vm.exec("until test -e /out/log; do sleep 0.02; done", timeout_s=PATIENCE_S)
        async with vm.fork(mounts={"/out": HostDir(tmp_path, mode="ro")}) as child:
            refused = await child.exec(end, timeout_s=PATIENCE_S)
            await child.exec(
                "touch /out/new; rm -f /out/log; mount -o remount,rw /out", user="root"
            )
            before = {path.name: path.read_text() for path in tmp_path.iterdir()}
            written = await vm.exec(end, timeout_s=PATIENCE_S)
            seen = await child.exec(
                "until grep -q more /out/log; do sleep 0.02; done", timeout_s=PATIENCE_S
            )
        with pytest.raises(SandboxStateError, match="same mounts"):
            await vm.fork_many(
                2,
                each=lambda number: {"mounts": {"/out": HostDir(tmp_path, mode=MODES[number])}},
            )

    assert (refused.stdout, written.stdout) == ("refused\n", "written\n")
    assert before == {"log": ""}
    assert seen.ok
    assert (tmp_path / "log").read_text() == "more\n"


async def test_a_copy_has_the_mounts_that_its_original_has(tmp_path: Path) -> None:
    """Its kernel knows them already: another set of paths, another mode or another directory is refused."""
    given, other = tmp_path / "given", tmp_path / "other"
    given.mkdir()
    other.mkdir()
    given_ro, review = HostDir(given, mode="ro"), HostDir(given, mode="review")
    async with Sandbox.create(mounts={"/in": given_ro}, **GUEST) as vm:
        for mounts, message in (
            ({}, "/in is missing"),
            ({"/in": given_ro, "/more": given_ro}, "it had nothing at /more"),
            ({"/in": review}, "/in was mounted ro, not review"),
            ({"/in": HostDir(other, mode="ro")}, "take up the saved mount /in"),
        ):
            with pytest.raises(UsageError, match=message):
                await vm.fork(mounts=mounts)
        alive = await vm.exec("ls /in")

    assert alive.ok


async def test_each_copy_has_its_own_of_what_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Memory, and the private layer of a directory that is read-only; what is too large is refused by name."""
    (tmp_path / "file").write_text("of the host")
    shadow = Shadow(HostDir(tmp_path, mode="ro"), [".env"], private=Memory())
    mounts = {"/m": Memory(), "/workspace": shadow}
    say = "cat /m/file /workspace/.env"
    async with Sandbox.create(mounts=mounts, **GUEST) as vm:
        await vm.exec("mkdir /m/d; echo one > /m/file; echo secret > /workspace/.env", check=True)
        async with vm.fork() as child:
            await child.exec("echo two >> /m/d/../file; echo changed > /workspace/.env", check=True)
            await vm.exec("echo three >> /m/file", check=True)
            told = [(await each.exec(say)).stdout for each in (vm, child)]
            empty = await child.exec("ls -A /m/d /workspace")
        await vm.exec("head -c 3M /dev/zero > /m/large", check=True)
        monkeypatch.setattr("taskvm.fs.memory.MAX_SAVED", 2 << 20)
        with pytest.raises(UsageError, match="save the mount /m: Memory .*it holds 3 MiB, and 2"):
            await vm.fork()
        still = await vm.exec("ls /m")

    assert told == ["one\nthree\nsecret\n", "one\ntwo\nchanged\n"]
    assert empty.stdout.split() == ["/m/d:", "/workspace:", ".env", "file"]
    assert still.ok
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


async def test_a_copy_is_copied_and_saved_like_any_other(tmp_path: Path) -> None:
    """Forks of forks, and a checkpoint of one, after the original and its copy have gone."""
    vm = await Sandbox.create(**GUEST)
    for number in range(3):
        await vm.exec(f"echo {number} >> /var/tmp/log", check=True)
        child = await vm.fork()
        await vm.close()
        vm = child
    checkpoint = await vm.checkpoint(tmp_path / "line.qcow2", stop=True)
    async with Sandbox.create(checkpoint=checkpoint, **GUEST, warm=False) as resumed:
        said = await resumed.exec("cat /var/tmp/log")

    assert said.stdout == "0\n1\n2\n"


async def test_the_line_of_forks_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fork costs the original a layer; at the limit the error says what to do, and nothing else changes."""
    monkeypatch.setattr("taskvm.vm.layers.MAX_LAYERS", 3)
    async with Sandbox.create(**GUEST) as vm:
        async with vm.fork():
            with pytest.raises(SandboxStateError, match="make a checkpoint, and resume that"):
                await vm.fork()
        alive = await vm.exec("echo alive; touch /var/tmp/x")

    assert MAX_LAYERS > 3
    assert alive.ok


async def test_forks_that_are_gone_cost_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they were based on is merged when the limit is met; one that lives keeps what it has."""
    monkeypatch.setattr("taskvm.vm.layers.MAX_LAYERS", 4)
    read = "echo 3 > /proc/sys/vm/drop_caches; cat /var/tmp/log"
    async with Sandbox.create(**GUEST) as vm, AsyncExitStack() as stack:
        said, right = [], ""
        for number in range(6):
            await vm.exec(f"echo {number} >> /var/tmp/log; sync", check=True)
            right += f"{number}\n"
            child = await stack.enter_async_context(vm.fork())
            said.append((await child.exec(read)).stdout == right)
            if number:  # the first one lives on
                await child.close()
            else:
                eldest = child
        said += [(await vm.exec(read)).stdout == right, (await eldest.exec(read)).stdout == "0\n"]

    assert all(said), said


async def test_a_fork_that_is_cancelled_leaves_the_original_running() -> None:
    """At any moment: programs run on, the disk is written, and a later fork works."""
    async with Sandbox.create(**GUEST) as vm:
        for delay_s in (0.05, 0.2, 0.4, 0.6):
            children: list[Sandbox | TaskvmError] = []
            with contextlib.suppress(TimeoutError):  # a quick host may be done
                async with asyncio.timeout(delay_s):
                    children = await vm.fork_many(4)
            for child in children:
                assert isinstance(child, Sandbox)
                await child.close()
        await vm.exec("echo written > /var/tmp/written", check=True)
        async with vm.fork() as child:
            said = await child.exec("cat /var/tmp/written")

    assert said.stdout == "written\n"


async def test_one_copy_that_fails_is_its_error_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The original is closed, or the host's disk full, at the moment when one of three starts."""
    made = []

    def linked(disk: Disk, run_dir: Path) -> Disk:
        made.append(run_dir)
        if len(made) == 2:
            raise FileNotFoundError(2, "No such file or directory", "layer1.qcow2")
        return _linked(disk, run_dir)

    async with Sandbox.create(**GUEST) as vm:
        monkeypatch.setattr("taskvm.launch._linked", linked)
        started = await vm.fork_many(3)
        said = []
        for child in started:
            if isinstance(child, Sandbox):
                async with child:
                    said.append((await child.exec("echo alive")).stdout)
        failed = [each for each in started if isinstance(each, HostError)]

    assert said == ["alive\n"] * 2
    assert len(failed) == 1
    assert "layer1.qcow2" in str(failed[0])
    assert not made[1].exists()


async def test_a_copy_that_is_lost_while_others_start_is_a_lost_sandbox(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has started, so it is a sandbox; it says at once that it is gone, and why."""

    async def started_and_killed(*arguments: Any) -> list[Guest | TaskvmError]:
        (guest,) = started = await _start_all(*arguments)
        assert isinstance(guest, Guest)
        os.kill(qemu_of(guest.machine.pid), signal.SIGKILL)
        await until(lambda: guest.lost)
        return started

    monkeypatch.setattr("taskvm.checkpoints.forking._start_all", started_and_killed)
    async with Sandbox.create(**GUEST) as vm:
        (copy,) = await vm.fork_many(1)
        assert isinstance(copy, Sandbox)
        async with copy:
            state = copy.state
            with pytest.raises(SandboxLostError, match="QEMU was ended by SIGKILL"):
                copy.statistics()

    assert state == "lost"


@pytest.mark.parametrize("delay_s", [0.05, 0.2, 0.4, 0.8])
async def test_an_original_that_is_closed_meanwhile_is_an_error_of_each_copy_or_of_all(
    delay_s: float,
) -> None:
    """At any moment: nothing but errors of taskvm, and a copy that has started runs on."""
    said = []
    vm = await Sandbox.create(**GUEST)

    async def fork() -> list[Sandbox | TaskvmError]:
        try:
            return await vm.fork_many(3)
        except TaskvmError as error:
            return [error]

    async with asyncio.TaskGroup() as group:
        forking = group.create_task(fork())
        await asyncio.sleep(delay_s)
        await vm.close()
    for copy in forking.result():
        if isinstance(copy, Sandbox):
            async with copy:
                said.append((await copy.exec("echo alive")).stdout)

    assert said == ["alive\n"] * len(said)
    assert not vm._guest.directory.exists()


@pytest.mark.parametrize("kind", ["fork", "checkpoint"])
async def test_a_sandbox_that_is_closed_while_it_waits_to_be_copied_is_lost(
    tmp_path: Path, kind: str
) -> None:
    """Another copy is being made; then there is nothing left to be copied, not even its directory."""
    vm = await Sandbox.create(**GUEST)
    guest = vm._guest
    begun = {"fork": lambda: vm.fork_many(1), "checkpoint": lambda: vm.checkpoint(tmp_path / "it")}
    assert guest.watch is not None
    watch = guest.watch
    async with guest.kept_awake("make another"):
        copying = asyncio.get_running_loop().create_task(begun[kind]())
        await until(lambda: watch._needed == 2)
        await vm.close()

    with pytest.raises(SandboxLostError, match="it was closed"):
        await copying
    assert list(tmp_path.iterdir()) == []


async def test_an_original_that_is_closed_while_its_layer_is_made_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its directory goes, with the file that a thread has just written there."""

    def create_and_linger(path: Path, beneath: Disk) -> None:
        create_layer(path, beneath)
        wait_until(lambda: not path.exists())

    monkeypatch.setattr("taskvm.vm.layers.create_layer", create_and_linger)
    vm = await Sandbox.create(**GUEST)
    async with asyncio.TaskGroup() as group:
        forking = group.create_task(fork_error(vm))
        await until(lambda: (vm._guest.directory / "layer1.qcow2").exists())
        await vm.close()

    assert isinstance(forking.result(), TaskvmError)
    assert not vm._guest.directory.exists()


async def fork_error(vm: Sandbox) -> Exception | None:
    try:
        await vm.fork()
    except (TaskvmError, OSError) as error:
        return error
    return None


def test_the_example_finds_the_best_of_n(tmp_path: Path) -> None:
    """As a person runs it: the wrong attempts lose, and the host's directory stays as it was."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "best_of_n.py", "4", tmp_path],
        capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["good", "good", "bad", "bad"]
    assert lines[4] == "the best one changed:"
    assert [line.split() for line in lines[5:]] == [["added", "numbers"], ["added", "sorted"]]
    assert list(tmp_path.iterdir()) == []


async def test_the_example_says_which_copy_did_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The others are judged all the same."""
    spec = importlib.util.spec_from_file_location("best_of_n", EXAMPLES / "best_of_n.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "best_of_n", example)
    spec.loader.exec_module(example)
    fork_many = Sandbox.fork_many

    async def one_fails(vm: Sandbox, count: int) -> list[Sandbox | TaskvmError]:
        return [HostError("start a copy", "the disk is full"), *await fork_many(vm, count - 1)]

    monkeypatch.setattr(Sandbox, "fork_many", one_fails)
    await example.main(2, str(tmp_path))

    said = capsys.readouterr()
    assert said.err == "copy 0 did not start: start a copy: the disk is full\n"
    assert said.out.startswith("good")


def test_the_blocking_surface_forks_too() -> None:
    with sync.Sandbox.create(**GUEST) as vm:
        vm.exec("echo base > /dev/shm/base")
        with vm.fork() as child:
            said = child.exec("cat /dev/shm/base").stdout
        (other,) = vm.fork_many(1, each=lambda number: {"env": {"NUMBER": str(number)}})
        assert isinstance(other, sync.Sandbox)
        with other:
            number = other.exec("echo $NUMBER").stdout

    assert (said, number) == ("base\n", "0\n")
