"""KVM is believed when it has run a guest on this boot of the host with this QEMU."""

from pathlib import Path

import pytest

from taskvm.vm import accel
from taskvm.vm.qemu import Qemu, host_arch

QEMU = Qemu(
    path=Path("/usr/bin/qemu"),
    image_tool=Path("/usr/bin/qemu-img"),
    arch="x86_64",
    version="7.2",
    machine="pc-q35-7.2",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKVM_CACHE", str(tmp_path))


def test_a_verdict_is_remembered_for_this_boot_and_this_qemu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another boot of the host or another QEMU asks again."""
    accel.remember_verdict(QEMU, works=False, reason="it hung")
    same = accel.recall_verdict(QEMU)
    newer = accel.recall_verdict(
        Qemu(path=QEMU.path, image_tool=QEMU.image_tool, arch="x86_64", version="8", machine="m")
    )
    monkeypatch.setattr(accel, "_boot_id", lambda: "another boot")

    assert same is not None
    assert (same.works, same.reason) == (False, "it hung")
    assert newer is None
    assert accel.recall_verdict(QEMU) is None


def test_a_damaged_note_is_asked_again(tmp_path: Path) -> None:
    """A note that cannot be read is no verdict."""
    accel.remember_verdict(QEMU, works=True, reason="")
    (tmp_path / "kvm-x86_64.json").write_text("{")

    assert accel.recall_verdict(QEMU) is None


def test_a_device_that_is_not_there_is_an_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason names the device and what the kernel said."""
    monkeypatch.setattr(accel, "KVM_DEVICE", tmp_path / "kvm")

    assert "No such file" in str(accel.kvm_obstacle(host_arch()))


def test_a_device_that_is_not_kvm_is_an_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that opens and is something else is found out."""
    fake = tmp_path / "kvm"
    fake.write_text("")
    monkeypatch.setattr(accel, "KVM_DEVICE", fake)

    assert "version" in str(accel.kvm_obstacle(host_arch()))


def test_a_foreign_architecture_is_an_obstacle() -> None:
    """KVM runs guests of the host's architecture only."""
    assert accel.kvm_obstacle("riscv64") is not None
