"""From a started machine to a guest that is ready: its three ports taken over, its agent heard, its caches warm."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass

from taskvm.errors import HostError, SandboxLostError
from taskvm.identity import ENTROPY_BYTES, GuestUser, account_request
from taskvm.port import FramePort
from taskvm.vm.control import Control
from taskvm.vm.machine import Machine
from taskvm.wire.control import Done, ExecRequest, MkdirRequest, Started, SyncRequest
from taskvm.wire.frames import PORT_FS, PORT_NET

# A cold boot takes 4-6 s without KVM on a quiet machine, several times that on one that builds images beside it.
BOOT_TIMEOUT_S = 120.0
# Run once before a template is saved, so that every fork finds these programs and their libraries in its page cache:
# the first command of a sandbox then reads no disk. None of them is a user's, none leaves anything unique behind.
WARM_UP = (
    b"true; cat /etc/passwd /etc/bash.bashrc /root/.bashrc; "
    b"python3 -c 'import json, subprocess, re'; git --version; rg --version; env ls /; "
    b"grep -q . /etc/passwd; sed -n 1p /etc/passwd; mkdir -p /workspace; head -c1 /etc/passwd; "
    b"env true; sh -c :"
)
# Seconds without KVM on a quiet machine, many times that on a busy one.
WARM_UP_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Ports:
    """A machine's three ports, taken over as plain frame ports."""

    control: Control
    fs: FramePort
    net: FramePort

    def close(self) -> None:
        """Close all three. Idempotent."""
        self.control.close(SandboxLostError("use the guest", "its ports were closed"))
        self.fs.close()
        self.net.close()


async def reach_ready(machine: Machine, user: GuestUser) -> Ports:
    """Take over the machine's ports, wait for the agent's HELLO, add the user, and warm the guest's caches.

    Raises SandboxLostError with the console's last words when it does not come, HostError when it is too slow.
    """
    ports = Ports(
        await Control.open(machine.take("control")),
        await FramePort.open(machine.take("fs"), PORT_FS),
        await FramePort.open(machine.take("net"), PORT_NET),
    )
    try:
        await wait_hello(machine, ports.control)
        await add_account(ports.control, user)
        await _warm(ports.control)
        # Else each fork writes back what the boot has left to be written, seconds after its start.
        await ports.control.request(SyncRequest(), Done, "write the guest's files back")
    except BaseException:
        ports.close()
        raise
    return ports


async def wait_hello(machine: Machine, control: Control) -> None:
    """Wait for the agent of a machine that boots. Raises SandboxLostError with the console's last words."""
    try:
        async with asyncio.timeout(BOOT_TIMEOUT_S):
            await asyncio.shield(control.hello)
    except TimeoutError:
        raise SandboxLostError(
            "boot the guest",
            f"no word from its agent in {BOOT_TIMEOUT_S:.0f} s{machine.last_words()}",
            "`taskvm doctor` tells what this host can do",
        ) from None
    except SandboxLostError as error:
        await asyncio.wait([machine.exited], timeout=1)
        raise SandboxLostError("boot the guest", f"{error.cause}{machine.last_words()}") from error


async def add_account(control: Control, user: GuestUser) -> None:
    """Make the guest's ordinary user and its home, unless that is root."""
    if user.uid == 0:
        return
    account = account_request(
        user, hostname="taskvm", entropy=os.urandom(ENTROPY_BYTES), time_ns=time.time_ns()
    )
    home = MkdirRequest(
        path=user.home.encode(), uid=user.uid, gid=user.gid, mode=0o700, parents=True
    )
    await control.request(account, Done, "add the user to the guest")
    await control.request(home, Done, "make the user's home")


async def quiesce_ports(ports: Ports) -> None:
    """Bring all three ports to rest. The control port first: it freezes what runs, and a process that waits for a mount
    freezes only while that is still served.
    """
    await ports.control.port.quiesce()
    await ports.net.quiesce()
    await ports.fs.quiesce()


async def _warm(control: Control) -> None:
    request = ExecRequest(
        argv=[b"/bin/bash", b"-c", WARM_UP],
        env=[b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", b"HOME=/root"],
        cwd=b"/",
    )
    call = control.open_call(request, "warm the template", channels=(1, 2))
    for inlet in call.inlets.values():
        inlet.discard()
    await call.answer(Started)
    try:
        async with asyncio.timeout(WARM_UP_TIMEOUT_S):
            await call.exited
    except TimeoutError:
        raise HostError(
            "warm the template",
            f"the guest's first programs did not end in {WARM_UP_TIMEOUT_S:.0f} s",
            "Try again when this host has less to do; `taskvm doctor` tells what it can do",
        ) from None
