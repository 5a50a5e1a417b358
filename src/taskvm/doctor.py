"""What this host can do, and what is in the way: the findings behind `taskvm doctor`."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from typing import Literal

import msgspec

from taskvm.errors import ImageError, TaskvmError
from taskvm.image.build import runs_programs_of
from taskvm.image.manifest import DEBIAN_ARCHITECTURES, Image
from taskvm.image.store import ImageStore
from taskvm.limits import Limits
from taskvm.paths import cache_dir
from taskvm.vm.accel import kvm_obstacle, recall_verdict
from taskvm.vm.native import confine_binary, guest_binary
from taskvm.vm.qemu import find_qemu, host_arch
from taskvm.vm.rundir import run_base, sweep

Status = Literal["ok", "note", "fault"]
# An image takes 0.6 GiB and its build 2, a template the guest's memory, a sandbox what its disk grows to.
COMFORTABLE_BYTES = 3 * 1024**3


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at. A `fault` stops every sandbox; a `note` does not. `remedy` may be empty."""

    name: str
    status: Status
    text: str
    remedy: str = ""


async def examine() -> list[Finding]:
    """Look at everything a sandbox needs. Changes nothing, except that directories of dead sandboxes are removed."""
    return await asyncio.to_thread(lambda: [_guarded(name, look) for name, look in _CHECKS.items()])


def _guarded(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except TaskvmError as error:
        return Finding(
            name=name,
            status="fault",
            text=f"{error.operation}: {error.cause}",
            remedy=error.next_step,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        # Perhaps the host is only busy: a start says what is in its way.
        return Finding(name=name, status="note", text=f"this could not be found out: {error}")


def _platform() -> Finding:
    system = platform.system()
    text = f"{system} {platform.release()} on {host_arch()}, Python {platform.python_version()}"
    if system != "Linux":
        return Finding(
            name="host", status="fault", text=text, remedy="taskvm runs on Linux hosts only"
        )
    return Finding(name="host", status="ok", text=text)


def _qemu() -> Finding:
    qemu = find_qemu(host_arch())
    return Finding(
        name="qemu", status="ok", text=f"{qemu.path} {qemu.version}, machine {qemu.machine}"
    )


def _other_architecture() -> Finding:
    """Guests of the other processor: emulated, and only for who asks for them by an image."""
    other = "aarch64" if host_arch() == "x86_64" else "x86_64"
    try:
        qemu = find_qemu(other)
        agent = guest_binary(other)
    except TaskvmError as error:
        return Finding(
            name="other guests",
            status="note",
            text=f"no {other} guests: {error.operation}: {error.cause}",
            remedy=error.next_step,
        )
    text = f"{other} by TCG: {qemu.path} {qemu.version}, machine {qemu.machine}, {agent.name}"
    if not runs_programs_of(DEBIAN_ARCHITECTURES[other]):
        return Finding(
            name="other guests",
            status="note",
            text=f"{text}; images of it cannot be built here",
            remedy="apt-get install arch-test qemu-user-static binfmt-support",
        )
    return Finding(name="other guests", status="ok", text=text)


def _accelerator() -> Finding:
    obstacle = kvm_obstacle(host_arch())
    if obstacle is not None:
        return _tcg(obstacle)
    verdict = recall_verdict(find_qemu(host_arch()))
    if verdict is None:
        return Finding(
            name="accelerator",
            status="note",
            text="/dev/kvm opens; whether it runs a guest is found out at the first start",
        )
    if verdict.works:
        return Finding(name="accelerator", status="ok", text="KVM, proven: it ran a guest")
    return _tcg(verdict.reason)


def _tcg(reason: str) -> Finding:
    return Finding(
        name="accelerator",
        status="note",
        text=f"TCG (emulation, several times slower). KVM is not used: {reason}",
        remedy="A working /dev/kvm is faster, and QEMU gives a security promise for it; for TCG it gives none",
    )


def _confinement() -> Finding:
    command = [
        str(confine_binary()),
        "--execute",
        "/usr",
        "--execute",
        "/lib",
        "--execute",
        "/lib64",
    ]
    read, write = os.pipe()
    try:
        done = subprocess.run(
            [*command, "--report", str(write), "--", "/usr/bin/env", "true"],
            pass_fds=(write,),
            capture_output=True,
            text=True,
            timeout=20,
        )
        os.close(write)
        write = -1
        report = json.loads(os.read(read, 4096) or b"{}")
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
    if "landlock" not in report:
        return Finding(
            name="confinement",
            status="fault",
            text=done.stderr.strip() or "the supervisor did not report",
            remedy="Use a Linux kernel 5.14 or later with Landlock among its security modules",
        )
    parts = [f"Landlock {report['landlock']}", "seccomp", "no capabilities"]
    if report["namespaces"]:
        return Finding(
            name="confinement",
            status="ok",
            text=", ".join([*parts, "network and process namespaces"]),
        )
    return Finding(
        name="confinement",
        status="note",
        text=", ".join(parts) + "; no namespaces: this host does not let users make them",
    )


def _guest_agent() -> Finding:
    return Finding(name="agent", status="ok", text=str(guest_binary(host_arch())))


def _images() -> Finding:
    store = ImageStore()
    images: list[Image] = []
    damaged: dict[str, str] = {}
    for digest in store.digests():
        try:
            images.append(store.get(digest))
        except ImageError as error:
            damaged[digest[:12]] = error.cause
    if damaged:
        return Finding(
            name="image",
            status="note",  # the default image is built anew when it is needed, and the others are sound
            text=f"{len(images)} sound in the store; damaged: "
            + ", ".join(f"{digest} ({cause})" for digest, cause in damaged.items()),
            remedy=" && ".join(f"taskvm image rm {digest}" for digest in damaged),
        )
    if not images:
        return Finding(
            name="image",
            status="note",
            text="no guest image yet; the first sandbox builds one (about a minute)",
            remedy="taskvm image build",
        )
    newest = max(images, key=lambda image: image.manifest.created)
    return Finding(
        name="image", status="ok", text=f"{len(images)} in the store, newest {newest.digest[:12]}"
    )


def _builder() -> Finding:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # not in every user's PATH
    tools = ("mmdebstrap", "mke2fs", "dpkg-deb")
    missing = [name for name in tools if shutil.which(name, path=path) is None]
    if missing:
        return Finding(
            name="image tools",
            status="note",
            text=f"missing: {', '.join(missing)}; needed to build images only",
            remedy="apt-get install mmdebstrap e2fsprogs dpkg fakeroot uidmap",
        )
    return Finding(name="image tools", status="ok", text="mmdebstrap, mke2fs, dpkg-deb")


def _disk() -> Finding:
    cache = cache_dir()
    free = shutil.disk_usage(cache).free
    text = f"{free / 2**30:.1f} GiB free for {cache}"
    if free >= COMFORTABLE_BYTES:
        return Finding(name="disk", status="ok", text=text)
    least = Limits().free_disk_mib
    starts = free >> 20 >= least
    return Finding(
        name="disk",
        status="note" if starts else "fault",
        text=f"{text}; "
        + (
            "an image build or a larger guest may need more"
            if starts
            else f"{least} MiB must remain"
        ),
        remedy="Free disk space, or set TASKVM_CACHE to a directory on a larger disk",
    )


def _leftovers() -> Finding:
    removed = sweep(run_base())
    running = len([path for path in run_base().iterdir() if path.name.startswith("sandbox-")])
    text = f"{running} running"
    if removed:
        text += f"; removed what {len(removed)} killed processes had left"
    return Finding(name="sandboxes", status="ok", text=text)


_CHECKS: dict[str, Callable[[], Finding]] = {
    "host": _platform,
    "qemu": _qemu,
    "other guests": _other_architecture,
    "accelerator": _accelerator,
    "confinement": _confinement,
    "agent": _guest_agent,
    "image tools": _builder,
    "image": _images,
    "disk": _disk,
    "sandboxes": _leftovers,
}


def render_findings(findings: list[Finding]) -> str:
    """Return the findings as a JSON list."""
    return msgspec.json.encode(findings).decode()
