"""A guest and everything on the host that serves it: woken up, equipped for a sandbox, ended.

Here the parts that know nothing of each other (vm, fs, net) are put together, and taken apart again. `wake` makes a
fresh fork a guest of its own and needs no options, so a pool can do it ahead; `equip` makes it somebody's sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from taskvm.background import Background, finished
from taskvm.checkpoints.carried import Carried, CarriedMount
from taskvm.egress.boundsecret import BoundSecret
from taskvm.errors import SandboxLostError, TaskvmError, UsageError
from taskvm.files import Files
from taskvm.fs.provider import Provider
from taskvm.fs.server import FsServer
from taskvm.identity import (
    ENTROPY_BYTES,
    GuestUser,
    guest_environment,
    identity_request,
    refresh_request,
    trust_requests,
)
from taskvm.net.auditlog import AuditLog
from taskvm.net.gateway import Gateway
from taskvm.net.resolver import HostResolver, MappedResolver
from taskvm.net.truststore import make_bundle
from taskvm.options import SandboxOptions
from taskvm.paths import private_dir, state_dir
from taskvm.port import FramePort
from taskvm.review.mounted import ReviewMount, clock_ns
from taskvm.vm.boot import add_account, wait_hello
from taskvm.vm.control import Control, ControlClosedError
from taskvm.vm.cpushare import CpuShare
from taskvm.vm.disk import disk_size
from taskvm.vm.layers import Layers
from taskvm.vm.machine import Machine
from taskvm.vm.qemu import Qemu
from taskvm.vm.rundir import RunDir, run_base
from taskvm.vm.template import GuestFiles
from taskvm.watch import Watch
from taskvm.wire.control import (
    Done,
    ExecRequest,
    GrowRequest,
    MountRequest,
    RenewRequest,
    Request,
    Started,
    SyncRequest,
)
from taskvm.wire.frames import PORT_NET

# Writing what programs left in mapped pages of a mount back to the host, when a sandbox is closed.
FLUSH_TIMEOUT_S = 10.0
# Removing what a guest made of a large tree.
RENEW_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Origin:
    """What a guest was started from: with which QEMU, which files, and for whom."""

    qemu: Qemu
    files: GuestFiles
    user: GuestUser


class Guest:
    """A machine with its control port and its owner's name. `on_lost` is called once when it is gone.

    `id` names the sandbox. `audit_path` is where its egress is written down, once it is
    equipped.
    """

    def __init__(
        self,
        machine: Machine,
        control: Control,
        run_dir: RunDir,
        origin: Origin,
        carried: Carried | None = None,
    ) -> None:
        self.id: str = run_dir.path.name
        self.machine = machine
        self.control = control
        self.origin = origin
        self.user: GuestUser = origin.user
        self.on_lost: Callable[[Exception], None] = lambda error: None
        self.audit_path: Path = Path()
        self.watch: Watch | None = None
        self.gateway: Gateway | None = None
        self.reviews: dict[str, ReviewMount] = {}
        self.layers: Layers = Layers(machine, run_dir.path)
        self._net: FramePort | None = None
        self._server: FsServer | None = None
        self._run_dir = run_dir
        self._carried = carried
        # Imported here: cryptography is a quarter of what importing this package would cost.
        from taskvm.net.certs import CertificateAuthority

        self._ca = (
            CertificateAuthority.load(carried.authority.encode())
            if carried
            else CertificateAuthority.create()
        )
        self._background = Background(self._fail)
        self._release = contextlib.AsyncExitStack()
        self._lost: Exception | None = None
        self.flushes: bool = False  # whether a mount may have pages to be written back
        self._mounts: dict[str, Provider] = {}
        self._free_disk_mib = 0
        control.on_lost = self._fail
        control.port.explain_end = machine.tell_end
        machine.on_flood = self._fail

    @classmethod
    async def take_over(
        cls, machine: Machine, run_dir: RunDir, origin: Origin, carried: Carried | None = None
    ) -> Guest:
        """Become the owner of a started machine and its directory; both are released when this fails.

        `carried` is of the saved guest that this one goes on as.
        """
        try:
            control = await Control.open(machine.take("control"))
            if carried is not None:
                control.adopt(carried.control)  # first: the numbers of its streams are taken
            return cls(machine, control, run_dir, origin, carried)
        except BaseException:
            await machine.kill()
            run_dir.remove()
            raise

    @property
    def lost(self) -> Exception | None:
        """Why it is gone, if it is."""
        return self._lost

    @property
    def placeholders(self) -> Mapping[str, str]:
        """What it sees instead of each secret that it has now."""
        return {} if self.gateway is None else self.gateway.keyring.placeholders

    @property
    def directory(self) -> Path:
        """Its directory on the host, which holds the overlay of its disk."""
        return self._run_dir.path

    @property
    def environment(self) -> dict[str, str]:
        """The variables that its commands start with."""
        shape = self.machine.shape
        emulated = shape.accelerator == "tcg" and shape.arch == "x86_64"
        return guest_environment(self.user, emulated_x86=emulated)

    # Waking up.

    async def wake(self, *, resumed: bool) -> None:
        """Let the guest run and give it its identity. A `resumed` one is paused and its ports are at rest.

        The request lies in the port before the machine runs on, so nothing can run before it. The programs of one that
        goes on from a checkpoint wait, frozen, until it is equipped.
        """
        if not resumed:
            await wait_hello(self.machine, self.control)
            await add_account(self.control, self.user)
        request = identity_request(
            hostname=self.id,
            machine_id=secrets.token_hex(16),
            ca_certificate=self._ca.certificate_pem,
            entropy=os.urandom(ENTROPY_BYTES),
            time_ns=time.time_ns(),
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ask(request, "give the guest its identity"))
            if resumed:
                group.create_task(self._continue())
        if resumed and self._carried is None:
            self.control.port.resume()

    async def doze(self) -> None:
        """Run a trivial command, so that the emulator has translated that path, and pause. Nothing of a user's runs."""
        environment = [f"{name}={value}".encode() for name, value in self.environment.items()]
        for argv in ([b"true"], [b"/bin/bash", b"-c", b"true"]):
            request = ExecRequest(argv=argv, env=environment, cwd=b"/")
            call = self.control.open_call(request, "warm the guest", channels=(1, 2))
            await call.answer(Started)
            await call.exited
        await self.machine.execute("stop")

    async def rouse(self) -> None:
        """Let a dozing guest run on, with the time and entropy of now."""
        request = refresh_request(
            hostname=self.id, entropy=os.urandom(ENTROPY_BYTES), time_ns=time.time_ns()
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(
                self._ask(request, "refresh the guest's clock and entropy", urgent=True)
            )
            group.create_task(self._continue())

    async def grow_disk(self, size_bytes: int) -> None:
        """Make its disk, and the file system on it, `size_bytes` large. Raises UsageError when it is larger already."""
        present = disk_size(self.layers.disk)
        if size_bytes < present:
            raise UsageError(
                f"start a sandbox with disk_size_mib={size_bytes >> 20}",
                f"its image has a disk of {present >> 20} MiB",
                "Leave it out, or choose a larger one",
            )
        if size_bytes > present:
            await self.layers.resize(size_bytes)
            await self._ask(GrowRequest(size=size_bytes), "grow the guest's file system")

    def _bind_processor(self, cpus: float) -> None:
        processes = [self.machine.pid, *filter(None, [self.machine.qemu_pid])]
        share = CpuShare.take(
            self.id, cpus, processes, runs=lambda name: (run_base() / name).exists()
        )
        self._release.callback(share.release)

    # Becoming somebody's sandbox.

    async def equip(
        self, options: SandboxOptions, bound: Sequence[BoundSecret], *, resumed: bool
    ) -> None:
        """Serve the mounts and mediate the network that `options` name."""
        self._free_disk_mib = options.limits.free_disk_mib
        if (size_bytes := options.limits.disk_size_bytes) is not None:
            await self.grow_disk(size_bytes)
        if options.limits.cpu_share is not None:
            self._bind_processor(options.limits.cpu_share)
        net = self._net = await FramePort.open(self.machine.take("net"), PORT_NET)
        net.explain_end = self.machine.tell_end
        self._release.callback(net.close)
        gateway = self.gateway = self._make_gateway(options, bound, net)
        self._release.push_async_callback(gateway.ingress.aclose)  # run may be cancelled unbegun
        self._background.start(gateway.run(), f"egress of {self.id}")
        server = self._server = FsServer(
            self.machine.take("fs"), on_failure=self._fail_from_thread()
        )
        self._release.push_async_callback(asyncio.to_thread, server.close)
        if self._carried is not None:
            gateway.reset(self._carried.gateway.streams)
        await self._serve(server, options.mounts)
        if resumed:
            net.resume()
            server.resume()
        if self._carried is not None:
            self.control.port.resume()
        if options.passthrough:
            await self._widen_trust(options.extra_ca_files)
        if self._carried is None or not self._carried.mounts:
            await self._mount()
        self.watch = Watch(
            self,
            options.limits,
            directory=self.directory,
            connections=lambda: gateway.connections,
            traffic=lambda: net.frames + server.frames,
        )
        self._background.start(self.watch.run(), f"watch over {self.id}")

    async def _widen_trust(self, extra_ca_files: Sequence[Path]) -> None:
        """Let the guest trust this host's authorities too: it verifies some servers itself."""
        bundle = await asyncio.to_thread(make_bundle, self._ca.certificate_pem, extra_ca_files)
        for request in trust_requests(
            bundle, hostname=self.id, random_bytes=os.urandom, time_ns=time.time_ns
        ):
            await self._ask(request, "give the guest the host's authorities")

    def _make_gateway(
        self, options: SandboxOptions, bound: Sequence[BoundSecret], net: FramePort
    ) -> Gateway:
        self.audit_path = (
            options.audit_path or private_dir(state_dir() / "audit") / f"{self.id}.jsonl"
        )
        audit = AuditLog.open(self.audit_path, self.id)
        self._release.callback(audit.close)
        resolver = HostResolver()
        self._release.callback(resolver.close)
        return Gateway(
            net,
            policy=options.policy,
            oversight=options.oversight,
            secrets=bound,
            audit=audit,
            ca=self._ca,
            resolver=MappedResolver(options.resolve, resolver),
            extra_ca_files=options.extra_ca_files,
            passthrough=options.passthrough,
            saved=self._carried.gateway if self._carried else None,
            is_running=self.control.is_running,
        )

    def carry(self) -> Carried:
        """Return what the host knows of this guest, which is at rest. Raises UsageError for a mount that stays."""
        assert self.gateway is not None, "only an equipped guest comes to rest"
        assert self._server is not None, "only an equipped guest comes to rest"
        states = self._server.export_mounts()
        return Carried(
            control=self.control.export(),
            gateway=self.gateway.export(),
            placeholders=dict(self.placeholders),
            authority=self._ca.export().decode(),
            mounts={
                path: CarriedMount.of(provider, states[number], self.reviews.get(path))
                for number, (path, provider) in enumerate(self._mounts.items(), start=1)
            },
        )

    async def _serve(self, server: FsServer, mounts: Mapping[str, Provider]) -> None:
        """Serve the mounts, those of a saved guest from where they were left. Its kernel knows them by their numbers,
        which follow from their paths.
        """
        saved = self._carried.mounts if self._carried else {}
        # Outer mounts before inner ones: a mount hides what was mounted below its path earlier.
        self._mounts = {path: mounts[path] for path in sorted(mounts)}
        for number, (path, provider) in enumerate(self._mounts.items(), start=1):
            known = saved.get(path)
            review = ReviewMount.of(number, path, provider)
            if review is not None:
                self.reviews[path] = review if known is None else known.dated(review)
            state = None if known is None else known.state
            await asyncio.to_thread(server.add_mount, number, provider, state, name=path)
            self.flushes = self.flushes or not provider.readonly

    async def _mount(self) -> None:
        for number, (path, provider) in enumerate(self._mounts.items(), start=1):
            review = self.reviews.get(path)
            request = MountRequest(
                id=number,
                path=path.encode(),
                readonly=provider.readonly,
                file=provider.is_file,
                layer=None if review is None else review.layer.encode(),
            )
            await self._ask(request, f"mount {path} in the guest")
            if review is not None:
                await self._date(review)

    async def _date(self, review: ReviewMount) -> None:
        """Note that changes which came with a checkpoint began from files of an unknown time. Nothing of the user's
        runs yet, so the agent is ours.
        """
        files = Files(self.control, self.user.uid, self.user.gid)
        if self.origin.files.checkpoint and await files.list_layer(review.upper):
            self.reviews[review.path] = replace(review, since_ns=0)

    async def renew(self, review: ReviewMount) -> None:
        """Drop what the guest changed in a review mount. Raises GuestError (EBUSY) while a program uses it."""
        operation = f"discard the changes in {review.path}"
        request = RenewRequest(id=review.id)
        now = clock_ns()
        await self.control.request(request, Done, operation, RENEW_TIMEOUT_S)
        self.reviews[review.path] = replace(review, since_ns=now, applied={})

    async def flush(self) -> None:
        """Write what programs left in mapped pages of the mounts back to the host.

        Raises GuestError when that takes longer than FLUSH_TIMEOUT_S, SandboxLostError.
        """
        if self.flushes:
            await self.control.request(SyncRequest(), Done, "flush the mounts", FLUSH_TIMEOUT_S)

    # Rest.

    def spare_bytes(self, directory: Path) -> int:
        """Return what must stay free on the disk of `directory`, if that is its own: else this sandbox is ended."""
        same = directory.stat().st_dev == self.directory.stat().st_dev
        return self._free_disk_mib << 20 if same else 0

    @property
    def mounts(self) -> Mapping[str, Provider]:
        """What is mounted in it, by path."""
        return self._mounts

    @asynccontextmanager
    async def kept_awake(self, operation: str) -> AsyncIterator[None]:
        """Wake the guest if it is paused, and pause it no more until the end. One at a time.

        Raises SandboxLostError, of the `operation`, when it has ended, or was closed, by then.
        """
        assert self.watch is not None, "only an equipped guest is watched"
        async with self.watch.kept_awake():
            self.control.require_open(operation)
            yield

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """Freeze the guest's programs, write its files back and drain all ports; it goes on at the end.

        Raises SandboxLostError. The watch must be `kept_awake`.
        """
        assert self._net is not None, "only an equipped guest comes to rest"
        # While programs run: less is left to be written when they stand still.
        await self._ask(SyncRequest(), "write the guest's files back")
        ports = (self.control.port, self._net)
        for port in ports:
            port.hold()  # what is sent now is neither lost nor half in a saved guest
        try:
            await self._quiesce()
            with self.control.asleep():  # it is stopped for as long as its memory takes to be saved
                yield
        finally:
            try:
                with contextlib.suppress(SandboxLostError):
                    await self._resume()
            finally:  # else all that is asked later would wait for ever
                for port in ports:
                    port.release()

    async def _quiesce(self) -> None:
        """Control first: it freezes what runs, and what waits for a mount freezes only while that is still served."""
        assert self._net is not None, "only an equipped guest comes to rest"
        assert self._server is not None, "only an equipped guest comes to rest"
        await self.control.port.quiesce()
        await self._ask(SyncRequest(), "write the guest's files back", urgent=True)
        await self._net.quiesce()
        given_up = threading.Event()
        try:
            # Its end is waited for: what it does later would stop a guest that has gone on.
            await finished(asyncio.to_thread(self._server.quiesce, given_up), hurry=given_up.set)
        except TimeoutError as error:
            raise SandboxLostError("bring the mounts to rest", str(error)) from error

    async def _resume(self) -> None:
        assert self._net is not None, "only an equipped guest comes to rest"
        assert self._server is not None, "only an equipped guest comes to rest"
        try:
            await finished(asyncio.to_thread(self._server.resume))
        except TimeoutError as error:  # its mounts would hang: better no guest than half of one
            self._fail(SandboxLostError("let the mounts go on", str(error)))
        finally:
            self._net.resume()
            self.control.port.resume()

    # Ending.

    async def close(self, *, flush: bool = False) -> None:
        """End the guest and release everything. With `flush`, dirty pages of mounts are written first. Idempotent.

        A cancellation ends the flush only: whichever step it meets, those below it happen.
        """
        self.on_lost = lambda error: None
        async with contextlib.AsyncExitStack() as ending:  # from the last to the first
            ending.callback(self._run_dir.remove)
            ending.push_async_callback(self._release.aclose)
            ending.push_async_callback(self._background.aclose)
            ending.push_async_callback(self.machine.kill)  # the background may be doing the same
            closed = ControlClosedError("use the sandbox", "it was closed")
            ending.callback(self.control.close, closed)
            if flush and self._lost is None:
                with contextlib.suppress(TaskvmError):  # a guest that does not answer saves nothing
                    await self.flush()

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

    async def _continue(self) -> None:
        await self.machine.execute("cont")

    async def _ask(self, request: Request, operation: str, *, urgent: bool = False) -> None:
        await self.control.request(request, Done, operation, urgent=urgent)


async def close_all(guests: Iterable[Guest]) -> None:
    """Close them one after the other. A cancellation, which one of them meets, leaves none of the others running."""
    async with contextlib.AsyncExitStack() as ending:
        for guest in guests:
            ending.push_async_callback(guest.close)
