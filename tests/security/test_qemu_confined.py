"""QEMU itself, as if the guest had taken it over: its monitor is asked to open what it must not."""

from pathlib import Path

import pytest

from taskvm import Sandbox, SandboxLostError
from taskvm.vm.machine import Machine

pytestmark = pytest.mark.vm


def machine_of(vm: Sandbox) -> Machine:
    return vm._guest.machine


def qemu_pid(vm: Sandbox) -> int:
    children = Path(f"/proc/{vm.host_pid}/task/{vm.host_pid}/children").read_text().split()
    return int(children[0])


async def test_qemu_cannot_open_the_users_files(vm: Sandbox, tmp_path: Path) -> None:
    """A private key and a system file are refused to the process that serves the guest."""
    key = tmp_path / "id_ed25519"
    key.write_text("canary")
    refusals = []

    for path in (key, Path("/etc/shadow"), Path("/proc/1/environ")):
        with pytest.raises(SandboxLostError) as caught:
            await machine_of(vm).execute(
                "blockdev-add", driver="file", **{"filename": str(path), "node-name": "stolen"}
            )
        refusals.append(str(caught.value))

    assert all("Permission denied" in text or "No such file" in text for text in refusals)
    assert key.read_text() == "canary"


async def test_qemu_cannot_open_a_socket(vm: Sandbox, tmp_path: Path) -> None:
    """Neither TCP nor a Unix socket can be made: not to listen, not to connect."""
    addresses = [
        {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}},
        {"type": "unix", "data": {"path": str(tmp_path / "socket")}},
    ]
    for number, address in enumerate(addresses):
        for server in (True, False):
            backend = {
                "type": "socket",
                "data": {"addr": address, "server": server, "wait": False},
            }
            with pytest.raises(SandboxLostError, match="ermitted|denied|ailed|resolve"):
                await machine_of(vm).execute(
                    "chardev-add", id=f"leak{number}{server}", backend=backend
                )
    assert not (tmp_path / "socket").exists()


async def test_qemu_runs_with_every_wall_up(vm: Sandbox) -> None:
    """The process has no capabilities, no new privileges, seccomp filters, and namespaces of its own where possible."""
    pid = qemu_pid(vm)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )

    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["Seccomp_filters"]) >= 2
    assert int(status["CapEff"], 16) == 0
    assert int(status["CapPrm"], 16) == 0


async def test_qemu_sees_nothing_of_the_users_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A secret in the host's environment is not in QEMU's, nor on its command line."""
    monkeypatch.setenv("CANARY_TOKEN", "canary-5d1f")
    async with Sandbox.create(cpus=1, memory_mib=256) as vm:
        pid = qemu_pid(vm)
        seen = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()

    assert b"canary-5d1f" not in seen


async def test_no_descriptor_of_the_template_is_writable(vm: Sandbox) -> None:
    """Of the files that QEMU holds open, only the sandbox's own disk is open for writing."""
    pid = qemu_pid(vm)
    writable = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
            info = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
        except FileNotFoundError:
            continue  # closed meanwhile
        flags = info.split("flags:\t")[1].split()[0]
        if target.startswith("/") and not target.startswith("/dev/") and int(flags, 8) & 3:
            writable.add(target)

    assert writable == {str(Path(target)) for target in writable if vm.id in target}
    assert len(writable) == 1


async def test_the_guest_has_no_network_card_and_few_devices(vm: Sandbox) -> None:
    """On its bus are a bridge, a disk and a serial port: nothing to send a packet with."""
    result = await vm.exec("cat /sys/bus/pci/devices/*/class; ls /sys/class/net")

    classes = [line for line in result.stdout.splitlines() if line.startswith("0x")]
    assert not [item for item in classes if item.startswith("0x02")]
    assert len(classes) <= 6
    assert set(result.stdout.splitlines()) - set(classes) <= {"lo", "eth0"}
