"""A guest of another processor than the host's: emulated, and otherwise like any. The image is built once (minutes)."""

from pathlib import Path

import pytest
from tests.support.images import CAN_BUILD_OTHER
from tests.support.images import OTHER_ARCH as OTHER
from tests.support.waiting import PATIENCE_S, growing

from taskvm import HostDir, ImageSpec, ImageStore, Sandbox, examine

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(900),  # the first run builds the image under emulation
    pytest.mark.skipif(
        not CAN_BUILD_OTHER,
        reason=f"this host runs no {OTHER} programs (binfmt_misc), so it cannot build an image of them",
    ),
]


@pytest.fixture(scope="module")
def image() -> str:
    return ImageStore().ensure(ImageSpec(arch=OTHER), print).digest


async def test_a_guest_of_the_other_processor_runs_commands_and_serves_files(
    image: str, workspace: object
) -> None:
    """Forked from a warm template of its own: commands, files, a terminal, a mount, limits."""
    mounts = {"/workspace": HostDir(str(workspace))}
    async with Sandbox.create(image=image, cpus=1, memory_mib=256, mounts=mounts) as vm:
        machine = await vm.exec("uname -m; python3 -c 'print(6 * 7)'; git --version", check=True)
        failed = await vm.exec("echo out; echo err >&2; exit 3")
        await vm.files.write_bytes("/tmp/data", bytes(range(256)) * 4096)
        back = await vm.files.read_bytes("/tmp/data")
        await vm.exec("sha256sum /tmp/data > /workspace/sum", check=True)
        async with await vm.spawn("stty size; exit 7", pty=(30, 100)) as shell:
            screen = b"".join([piece async for piece in shell.stdout])
        for limit_s in growing(2):
            killed = await vm.exec("sleep 500 & echo started; sleep 500", timeout_s=limit_s)
            if killed.stdout:
                break

        assert machine.stdout.split("\n")[:2] == [OTHER, "42"]
        assert (failed.stdout, failed.stderr, failed.exit_code) == ("out\n", "err\n", 3)
        assert back == bytes(range(256)) * 4096
        assert screen.split() == [b"30", b"100"]
        assert killed.timed_out
        assert killed.usage is not None
        assert killed.usage.processes_peak >= 2
        assert vm.accelerator == "tcg"


async def test_two_forks_of_the_other_processor_share_nothing_that_must_be_unique(
    image: str,
) -> None:
    ask = "cat /proc/sys/kernel/random/uuid /etc/machine-id; hostname; date +%Y"
    answers = []
    for _ in range(2):
        async with Sandbox.create(image=image, cpus=1, memory_mib=256) as vm:
            answers.append((await vm.exec(ask, check=True)).stdout.split())

    (*first, year), (*second, _) = answers
    assert not set(first) & set(second)
    assert int(year) >= 2025


async def test_a_guest_of_the_other_processor_is_copied_and_saved_with_its_programs(
    image: str, tmp_path: Path
) -> None:
    """A fork, and what resumes from memory: files, memory, and a program that goes on; the disk alone, booted anew."""
    count = (
        "for i in $(seq 9); do echo $i > /dev/shm/count; "
        "test $i != 4 || until test -e /dev/shm/go; do sleep 0.1; done; done"
    )
    finish = "touch /dev/shm/go; until grep -q 9 /dev/shm/count; do sleep 0.1; done; cat /root/kept"
    async with Sandbox.create(image=image, cpus=1, memory_mib=256) as vm:
        await vm.exec("echo kept > /root/kept", user="root", check=True)
        await vm.spawn(count)
        await vm.exec("until grep -q 4 /dev/shm/count; do sleep 0.1; done", timeout_s=PATIENCE_S)
        whole = await vm.checkpoint(tmp_path / "whole", memory=True)
        disk = await vm.checkpoint(tmp_path / "disk.qcow2")
        async with vm.fork() as child:
            copied = await child.exec(finish, user="root", timeout_s=PATIENCE_S)
    async with whole.resume() as vm:
        resumed = await vm.exec(finish, user="root", timeout_s=PATIENCE_S)
    async with disk.resume() as vm:
        booted = await vm.exec("cat /root/kept; ls /dev/shm", user="root")

    assert copied.stdout == resumed.stdout == booted.stdout == "kept\n"


async def test_the_network_of_the_other_processor_is_closed_unless_allowed(image: str) -> None:
    async with Sandbox.create(image=image, cpus=1, memory_mib=256) as vm:
        refused = await vm.exec("curl -sS --max-time 100 http://example.com/")

        assert not refused.ok
        assert '"decision":"deny"' in vm.audit_path.read_text()


async def test_the_doctor_knows_both_processors() -> None:
    (finding,) = [each for each in await examine() if each.name == "other guests"]

    assert finding.status == "ok"
    assert finding.text.startswith(f"{OTHER} by TCG")
