"""From options to a running guest: image, template, fork, identity, mounts, egress, in that order.

Here the parts that know nothing of each other (vm, fs, net, image) are put together, and taken apart again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from taskvm.background import Background
from taskvm.errors import SandboxLostError, TaskvmError
from taskvm.fs.server import FsServer
from taskvm.identity import ENTROPY_BYTES, identity_request
from taskvm.injection import BoundSecret, bind_secrets
from taskvm.net.auditlog import AuditLog
from taskvm.net.certs import CertificateAuthority
from taskvm.net.gateway import Gateway
from taskvm.net.resolver import HostResolver, MappedResolver
from taskvm.options import SandboxOptions
from taskvm.pool import Standby, fork, start_cold
from taskvm.port import FramePort
from taskvm.vm.boot import wait_hello
from taskvm.vm.control import Control
from taskvm.vm.paths import private_dir, state_dir
from taskvm.vm.warm import prepare
from taskvm.wanted import find_wanted
from taskvm.wire.control import Done, MkdirRequest, MountRequest, SyncRequest
from taskvm.wire.frames import PORT_NET

# Writing what programs left in mapped pages of a mount back to the host, when a sandbox is closed.
FLUSH_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Egress:
    gateway: Gateway
    ca: CertificateAuthority
    audit: AuditLog
    audit_path: Path
    resolver: HostResolver
    placeholders: Mapping[str, str]


class Guest:
    """A running guest and everything on the host that serves it. `on_lost` is called once when it is gone."""

    def __init__(self, started: Standby, control: Control, accelerator: str) -> None:
        self.id = started.id
        self.machine = started.machine
        self.control = control
        self.accelerator = accelerator
        self.on_lost: Callable[[Exception], None] = lambda error: None
        self.placeholders: Mapping[str, str] = {}
        self.audit_path = Path()
        self._started = started
        self._background = Background(self._fail)
        self._fs: FsServer | None = None
        self._net: FramePort | None = None
        self._egress: _Egress | None = None
        self._lost: Exception | None = None
        self._has_mounts = False
        control.on_lost = self._fail

    async def set_up(
        self, options: SandboxOptions, bound: Sequence[BoundSecret], *, resumed: bool
    ) -> None:
        """Make the guest this sandbox: identity first, then mounts and egress. `resumed` ports are at rest."""
        ca = await asyncio.to_thread(CertificateAuthority.create)
        self._fs = FsServer(self.machine.take("fs"), on_failure=self._fail_from_thread())
        self._net = await FramePort.open(self.machine.take("net"), PORT_NET)
        self._egress = _make_egress(self.id, options, bound, ca, self._net)
        self.placeholders = self._egress.placeholders
        self.audit_path = self._egress.audit_path
        self._background.start(self._egress.gateway.run(), f"egress of {self.id}")
        async with asyncio.TaskGroup() as group:
            group.create_task(self._identify(options, ca.certificate_pem))
            if resumed:
                group.create_task(self._continue())
        if resumed:
            self.control.port.resume()
            self._net.resume()
            self._fs.resume()
        await self._mount(options)

    async def close(self, *, flush: bool) -> None:
        """End the guest and release everything. With `flush`, dirty pages of mounts are written first. Idempotent."""
        self.on_lost = lambda error: None
        if flush and self._has_mounts and self._lost is None:
            with contextlib.suppress(TaskvmError):  # a guest that does not answer saves nothing
                await self.control.request(
                    SyncRequest(), Done, "flush the mounts", timeout_s=FLUSH_TIMEOUT_S
                )
        self.control.close(SandboxLostError("use the sandbox", "it was closed"))
        await self._background.aclose()
        if self._net is not None:
            self._net.close()
        await self._started.discard()
        if self._fs is not None:
            await asyncio.to_thread(self._fs.close)
        if self._egress is not None:
            self._egress.audit.close()
            self._egress.resolver.close()

    async def _continue(self) -> None:
        await self.machine.execute("cont")

    async def _identify(self, options: SandboxOptions, ca_certificate: bytes) -> None:
        user = options.user
        request = identity_request(
            hostname=self.id,
            machine_id=secrets.token_hex(16),
            user=user,
            ca_certificate=ca_certificate,
            entropy=os.urandom(ENTROPY_BYTES),
            time_ns=time.time_ns(),
        )
        await self.control.request(request, Done, "give the guest its identity")

    async def _mount(self, options: SandboxOptions) -> None:
        assert self._fs is not None
        user = options.user
        async with asyncio.TaskGroup() as group:
            if user.uid != 0:
                request = MkdirRequest(
                    path=user.home.encode(), uid=user.uid, gid=user.gid, mode=0o700, parents=True
                )
                group.create_task(self._ask(request, "make the user's home"))
            # Outer mounts before inner ones: a mount hides what was mounted below its path earlier.
            for number, path in enumerate(sorted(options.mounts), start=1):
                provider = options.mounts[path]
                self._fs.add_mount(number, provider)
                self._has_mounts = True
                mount = MountRequest(id=number, path=path.encode(), readonly=provider.readonly)
                await self._ask(mount, f"mount {path} in the guest")

    async def _ask(self, request: MkdirRequest | MountRequest, operation: str) -> None:
        await self.control.request(request, Done, operation)

    def _fail(self, error: BaseException) -> None:
        if self._lost is not None or not isinstance(error, Exception):
            return
        self._lost = error
        self.control.close(error)
        self.on_lost(error)
        # The virtual machine ends at once; the rest is released by close.
        self._background.start(self._end_machine(), f"end of {self.id}")

    async def _end_machine(self) -> None:
        await self.machine.kill()

    def _fail_from_thread(self) -> Callable[[Exception], None]:
        loop = asyncio.get_running_loop()

        def fail(error: Exception) -> None:
            loop.call_soon_threadsafe(self._fail, error)

        return fail


async def launch(options: SandboxOptions) -> Guest:
    """Start a guest for `options`. Raises as Sandbox.create; nothing is left behind then."""
    bound = bind_secrets(options.policy, options.secrets, os.urandom)  # wrong ones start nothing
    started, accelerator = await _start_machine(options)
    try:
        control = await Control.open(started.machine.take("control"))
        guest = Guest(started, control, accelerator)
    except BaseException:
        await started.discard()
        raise
    try:
        if not options.warm:
            await wait_hello(started.machine, control)
        await guest.set_up(options, bound, resumed=options.warm)
    except BaseException as error:
        await guest.close(flush=False)
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None
        raise
    return guest


async def _start_machine(options: SandboxOptions) -> tuple[Standby, str]:
    wanted = await find_wanted(
        image=options.image,
        accel=options.accel,
        cpus=options.cpus,
        memory_mib=options.memory_mib,
        progress=options.on_progress,
    )
    if not options.warm:
        return await start_cold(wanted)
    template = await prepare(wanted)
    standby = options.pool.take(template) if options.pool is not None else None
    return standby or await fork(template), template.shape.accelerator


def _make_egress(
    sandbox_id: str,
    options: SandboxOptions,
    bound: Sequence[BoundSecret],
    ca: CertificateAuthority,
    port: FramePort,
) -> _Egress:
    path = options.audit_path or private_dir(state_dir() / "audit") / f"{sandbox_id}.jsonl"
    audit = AuditLog.open(path, sandbox_id)
    resolver = HostResolver()
    gateway = Gateway(
        port,
        policy=options.policy,
        secrets=bound,
        audit=audit,
        ca=ca,
        resolver=MappedResolver(options.resolve, resolver),
        extra_ca_files=options.extra_ca_files,
    )
    placeholders = {item.secret.name: item.placeholder for item in bound}
    return _Egress(gateway, ca, audit, path, resolver, placeholders)
