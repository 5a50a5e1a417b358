"""From options to a running guest: image, template, fork, identity, mounts, egress, in that order.

Here the parts that know nothing of each other (vm, fs, net, image) are put together, and taken apart again.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from taskvm.background import Background
from taskvm.errors import SandboxLostError, TaskvmError
from taskvm.fs.server import FsServer
from taskvm.identity import ENTROPY_BYTES, identity_request
from taskvm.image.boot import boot_files
from taskvm.image.manifest import Image, ImageSpec
from taskvm.image.store import ImageStore
from taskvm.injection import bind_secrets
from taskvm.net.auditlog import AuditLog
from taskvm.net.certs import CertificateAuthority
from taskvm.net.gateway import Gateway
from taskvm.net.resolver import HostResolver, MappedResolver
from taskvm.options import SandboxOptions
from taskvm.port import FramePort
from taskvm.vm.boot import wait_hello
from taskvm.vm.command import Boot
from taskvm.vm.control import Control
from taskvm.vm.machine import Machine
from taskvm.vm.native import guest_binary
from taskvm.vm.paths import private_dir, state_dir
from taskvm.vm.qemu import Qemu, find_qemu, host_arch
from taskvm.vm.rundir import RunDir
from taskvm.vm.template import GuestFiles
from taskvm.vm.warm import Wanted, boot_cold, prepare
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

    def __init__(
        self, id: str, run_dir: RunDir, machine: Machine, control: Control, accelerator: str
    ) -> None:
        self.id = id
        self.machine = machine
        self.control = control
        self.accelerator = accelerator
        self.on_lost: Callable[[Exception], None] = lambda error: None
        self.placeholders: Mapping[str, str] = {}
        self.audit_path = Path()
        self._run_dir = run_dir
        self._background = Background(self._fail)
        self._fs: FsServer | None = None
        self._net: FramePort | None = None
        self._egress: _Egress | None = None
        self._lost: Exception | None = None
        self._has_mounts = False
        control.on_lost = self._fail

    async def set_up(self, options: SandboxOptions, *, resumed: bool) -> None:
        """Make the guest this sandbox: identity first, then mounts and egress. `resumed` ports are at rest."""
        egress = await asyncio.to_thread(_make_ca)
        self._fs = FsServer(self.machine.take("fs"), on_failure=self._fail_from_thread())
        self._net = await FramePort.open(self.machine.take("net"), PORT_NET)
        self._net.on_lost = self._fail
        self._egress = _make_egress(self.id, options, egress, self._net)
        self.placeholders = self._egress.placeholders
        self.audit_path = self._egress.audit_path
        self._background.start(self._egress.gateway.run(), f"egress of {self.id}")
        async with asyncio.TaskGroup() as group:
            group.create_task(self._identify(options, egress.certificate_pem))
            if resumed:
                group.create_task(_continue(self.machine))
        if resumed:
            self.control.port.resume()
            self._net.resume()
            self._fs.resume()
        await self._mount(options)

    async def close(self, *, flush: bool) -> None:
        """End the guest and release everything. With `flush`, dirty pages of mounts are written first. Idempotent."""
        self.on_lost = lambda error: None
        if flush and self._has_mounts and self._lost is None:
            try:
                await self.control.request(
                    SyncRequest(), Done, "flush the mounts", timeout_s=FLUSH_TIMEOUT_S
                )
            except TaskvmError:
                pass  # the guest does not answer: what it holds cannot be saved
        self.control.close(SandboxLostError("use the sandbox", "it was closed"))
        await self._background.aclose()
        if self._net is not None:
            self._net.close()
        await self.machine.kill()
        if self._fs is not None:
            await asyncio.to_thread(self._fs.close)
        if self._egress is not None:
            self._egress.audit.close()
            self._egress.resolver.close()
        self._run_dir.remove()

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
                mount = MountRequest(
                    id=number, path=path.encode(), readonly=provider.readonly
                )
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
        return lambda error: loop.call_soon_threadsafe(self._fail, error)


async def launch(options: SandboxOptions) -> Guest:
    """Start a guest for `options`. Raises as Sandbox.create; nothing is left behind then."""
    sandbox_id = f"sandbox-{secrets.token_hex(6)}"
    qemu = await asyncio.to_thread(find_qemu, host_arch())
    files = await asyncio.to_thread(_guest_files, options, qemu)
    run_dir = RunDir.create(sandbox_id)
    try:
        machine, accelerator = await _start_machine(options, qemu, files, run_dir)
    except BaseException:
        run_dir.remove()
        raise
    try:
        control = await Control.open(machine.take("control"))
        guest = Guest(sandbox_id, run_dir, machine, control, accelerator)
    except BaseException:
        await machine.kill()
        run_dir.remove()
        raise
    try:
        if not options.warm:
            await wait_hello(machine, control)
        await guest.set_up(options, resumed=options.warm)
    except BaseException as error:
        await guest.close(flush=False)
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None
        raise
    return guest


async def _start_machine(
    options: SandboxOptions, qemu: Qemu, files: GuestFiles, run_dir: RunDir
) -> tuple[Machine, str]:
    wanted = Wanted(
        qemu=qemu,
        guest=files,
        accel=options.accel,
        cpus=options.cpus,
        memory_mib=options.memory_mib,
        progress=options.on_progress,
    )
    if not options.warm:
        return await boot_cold(wanted, run_dir.path)
    template = await prepare(wanted)
    return await template.fork(run_dir.path), template.shape.accelerator


def _guest_files(options: SandboxOptions, qemu: Qemu) -> GuestFiles:
    store = ImageStore()
    if options.image is None:
        image = store.ensure(ImageSpec(arch=qemu.arch), options.on_progress)
    else:
        image = store.get(options.image)
    agent = guest_binary(qemu.arch)
    return _boot_files(image.path, image, agent, agent.stat().st_mtime_ns)


@lru_cache(maxsize=16)  # reading and hashing 4 MB costs 15 ms of every start otherwise
def _boot_files(path: Path, image: Image, agent: Path, changed_ns: int) -> GuestFiles:
    files = boot_files(image, agent)
    return GuestFiles(
        boot=Boot(kernel=files.kernel, initrd=files.initrd), rootfs=files.rootfs, digest=files.digest
    )


def _make_ca() -> CertificateAuthority:
    return CertificateAuthority.create()


async def _continue(machine: Machine) -> None:
    await machine.execute("cont")


def _make_egress(
    sandbox_id: str, options: SandboxOptions, ca: CertificateAuthority, port: FramePort
) -> _Egress:
    bound = bind_secrets(options.policy, options.secrets, os.urandom)
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
