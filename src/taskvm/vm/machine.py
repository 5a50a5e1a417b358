"""One QEMU process: started confined, driven over QMP, ended without a trace.

The machine knows nothing of what its ports carry. Every channel is a socket pair made before QEMU starts and
inherited by it: there is no socket file, no race for its name, and nothing to clean up.

The process ends with its owner: `taskvm-confine` holds the read end of a pipe (the lifeline) whose write end is only
here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient, QMPError

from taskvm.errors import HostError, SandboxLostError, UnavailableError
from taskvm.vm.command import (
    Boot,
    Descriptors,
    Disk,
    MachineShape,
    confine_command,
    qemu_command,
)
from taskvm.vm.eventrate import EventRate
from taskvm.vm.exitstatus import explain_exit
from taskvm.vm.native import confine_binary
from taskvm.vm.qemu import Qemu

# What is kept of the guest's console and of QEMU's standard error: enough for a panic or a linker error.
TAIL_BYTES = 64 * 1024
# QEMU answers QMP in about a millisecond; a host that swaps may take seconds.
QMP_TIMEOUT_S = 30.0
# State of a q35 machine is some hundred KB, its RAM is not in it: a second even on a slow disk.
LOAD_TIMEOUT_S = 60.0
# The set of descriptors that holds a state's file while it is written; layers of disks count from 1 (vm/layers.py).
STATE_FDSET = 0
# Between the end of QEMU's channels and that of its supervisor lie milliseconds; of memory that is torn down, more.
END_WAIT_S = 5.0
# The default for a disk overlay: it holds the disk of every image we build, and its tables (1/8192).
DISK_LIMIT_BYTES = 16 * 1024**3

# The library logs every disconnect; ours are deliberate and told as exceptions.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFiles:
    """The files of one machine. Of `disk` only the top layer is written.

    `memory` is None for anonymous memory; `share_memory` writes it (a template being made). `state` is device state
    to resume from. `disk_limit_bytes` is how far a file may grow; QEMU gets EFBIG beyond it, the guest an I/O error.
    """

    boot: Boot
    disk: Disk
    memory: Path | None = None
    share_memory: bool = False
    state: Path | None = None
    disk_limit_bytes: int = DISK_LIMIT_BYTES

    @property
    def incoming(self) -> bool:
        """Whether the machine goes on from a state, instead of booting."""
        return self.state is not None


class Tail(asyncio.Protocol):
    """Reads a stream for ever and keeps its last TAIL_BYTES."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def data_received(self, data: bytes) -> None:
        self._kept += data
        del self._kept[:-TAIL_BYTES]

    def text(self, limit: int = 2000) -> str:
        """The last `limit` characters, control bytes escaped: they come from an untrusted guest."""
        text = bytes(self._kept[-4 * limit :]).decode("utf-8", "replace").replace("\r\n", "\n")
        safe = "".join(c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
        return safe[-limit:].strip()


class Machine:
    """A QEMU process and the host's ends of its channels. Make one with `start`.

    `exited` is done when the process has ended.
    """

    def __init__(
        self,
        shape: MachineShape,
        files: MachineFiles,
        process: subprocess.Popen[bytes],
        sockets: dict[str, socket.socket],
    ) -> None:
        self.shape = shape
        self.files = files
        self._process = process
        self._qmp = QMPClient("taskvm")
        # The library keeps every event for a listener of its own, without a limit. A guest's root makes QEMU send
        # 20 000 a second (ACPI's _OST registers): 34 MB/s of our memory. We listen where we wait, and only there.
        self._qmp.events.event_filter = self._count_event
        self._events = EventRate()
        self.on_flood: Callable[[Exception], None] = lambda error: None
        self._qmp_socket = sockets.pop("qmp")
        self._lifeline: int | None = None
        self._pidfd = os.pidfd_open(process.pid)
        self._state_fd: int | None = None
        # The file that its memory is a private mapping of; it may have no name any more.
        self.memory: int | None = None
        self._tails: list[asyncio.BaseTransport] = []
        self._console_socket = sockets.pop("console")
        self._sockets = sockets
        self._ending = asyncio.Lock()
        self._giving = asyncio.Lock()
        self._released = False
        self.console: Tail = Tail()
        self.stderr: Tail = Tail()
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(cls, qemu: Qemu, shape: MachineShape, files: MachineFiles) -> Machine:
        """Start QEMU and negotiate QMP. The guest runs at once unless `files.state` is given.

        Raises UnavailableError with QEMU's own words when it does not come up.
        """
        machine = _spawn(qemu, shape, files)
        try:
            await machine._watch()
            await machine._negotiate()
        except BaseException:
            await machine.kill()
            raise
        return machine

    @property
    def pid(self) -> int:
        """The process id of the supervisor; QEMU is its only child."""
        return self._process.pid

    @property
    def qemu_pid(self) -> int | None:
        """The process id of QEMU, as this process sees it; None when it has ended."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        except OSError:
            return None
        return int(children.split()[0]) if children.strip() else None

    def take(self, port: Literal["control", "fs", "net"]) -> socket.socket:
        """Hand over the host's end of a port; the caller closes it. Once for each port."""
        return self._sockets.pop(port)

    async def execute(self, command: str, **arguments: object) -> object:
        """Run one QMP command. Raises SandboxLostError when QEMU is gone or refuses."""
        try:
            async with asyncio.timeout(QMP_TIMEOUT_S):
                return await self._qmp.execute(command, arguments or None)
        except (QMPError, TimeoutError) as error:
            if not isinstance(
                error, (ExecuteError, TimeoutError)
            ):  # it is gone: learn how it ended
                await asyncio.wait([self.exited], timeout=END_WAIT_S)
            raise SandboxLostError(
                f"ask QEMU for {command}", f"{str(error) or 'no answer'}{self.last_words()}"
            ) from error

    async def give(self, command: str, descriptor: int, **arguments: object) -> object:
        """Run a QMP command that takes a descriptor (getfd, add-fd). Raises as `execute`."""
        async with self._giving:
            # It travels with a byte that QMP's JSON parser skips (qmp-spec, getfd).
            self._qmp_socket.sendmsg(
                [b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))]
            )
            return await self.execute(command, **arguments)

    def listen(self, *events: str) -> AbstractContextManager[EventListener]:
        """Collect QEMU's `events`; none is kept while nobody listens."""
        return self._qmp.listener(events)

    async def next_event(self, events: EventListener, operation: str) -> Message:
        """Return the next of `events`. Raises SandboxLostError when QEMU ends, which no event tells."""
        coming = asyncio.get_running_loop().create_task(events.get())
        try:
            either: tuple[asyncio.Future[Any], ...] = (coming, self.exited)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                return coming.result()
        finally:
            coming.cancel()
        raise SandboxLostError(operation, f"QEMU has ended{self.last_words()}")

    async def load_state(self) -> None:
        """Load the device state given at the start. The guest is then paused: `execute("cont")` lets it run."""
        with self.listen("MIGRATION") as events:
            await self.execute(
                "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
            )
            await self.execute("migrate-incoming", uri=f"fd:{self._state_fd}")
            await self._wait_loaded(events)
        self._close_state()

    async def save_state(self, path: Path) -> None:
        """Write the device state of a stopped machine to the new file `path`; its RAM is not in it.

        The command is named after its first user; it needs nothing of Xen (qapi/migration.json).
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await self.give("add-fd", descriptor, **{"fdset-id": STATE_FDSET})
            try:
                name = f"/dev/fdset/{STATE_FDSET}"
                await self.execute("xen-save-devices-state", filename=name, live=False)
            finally:
                await self.execute("remove-fd", **{"fdset-id": STATE_FDSET})
        finally:
            os.close(descriptor)

    async def _wait_loaded(self, events: EventListener) -> None:
        operation = "load the saved state"
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                while (status := _status(await self.next_event(events, operation))) != "completed":
                    if status in ("failed", "cancelled"):
                        raise SandboxLostError(
                            operation, f"QEMU reports {status}{self.last_words()}"
                        )
        except TimeoutError as error:
            raise SandboxLostError(
                operation, f"not done after {LOAD_TIMEOUT_S:.0f} s{self.last_words()}"
            ) from error

    async def kill(self) -> int:
        """End the process at once and wait for it; close every descriptor. Idempotent. Returns the exit status."""
        async with self._ending:
            self._release_lifeline()
            if not self.exited.done():
                await self._wait_or_kill()
            if not self._released:
                self._released = True
                await self._release()
        return self.exited.result()

    async def _wait_or_kill(self) -> None:
        # Not awaited itself: a caller that is cancelled would cancel it for everybody.
        await asyncio.wait([self.exited], timeout=END_WAIT_S)
        if not self.exited.done():
            self._process.kill()
            await asyncio.wait([self.exited])

    async def _release(self) -> None:
        for transport in self._tails:
            transport.close()
        for sock in (*self._sockets.values(), self._qmp_socket, self._console_socket):
            sock.close()
        if self.memory is not None:
            os.close(self.memory)
            self.memory = None
        self._close_state()
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._qmp.disconnect()

    def last_words(self) -> str:
        """How QEMU ended, if it has, and what it and the guest's console said last; empty when there is nothing."""
        parts = [f"; {explain_exit(self.exited.result())}"] if self.exited.done() else []
        parts += [
            f"; {name}: {text}"
            for name, tail in (("QEMU said", self.stderr), ("the guest's console", self.console))
            if (text := tail.text())
        ]
        return "".join(parts)

    def tell_end(self, tell: Callable[[str], None]) -> None:
        """Call `tell` with the last words once QEMU has ended, or with "" when it has not after END_WAIT_S."""
        waiting = asyncio.get_running_loop().call_later(END_WAIT_S, lambda: told())

        def told(_exited: object = None) -> None:
            waiting.cancel()
            self.exited.remove_done_callback(told)
            tell(self.last_words() if self.exited.done() else "")

        self.exited.add_done_callback(told)

    def _count_event(self, event: Message) -> bool:
        if self._events.exceeds(asyncio.get_running_loop().time()):
            self.on_flood(
                SandboxLostError(
                    "listen to QEMU",
                    f"its guest floods it with events, the last a {event.get('event')}",
                    "The guest is hostile, or its disk has been full for long: its sandbox was ended",
                )
            )
        return False

    # Starting.

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pidfd, self._reap)
        stderr = self._process.stderr
        assert stderr is not None  # Popen was given a pipe
        transport, _ = await loop.connect_read_pipe(lambda: self.stderr, stderr)
        self._tails.append(transport)
        console, _ = await loop.create_connection(lambda: self.console, sock=self._console_socket)
        self._tails.append(console)

    async def _negotiate(self) -> None:
        try:
            async with asyncio.timeout(QMP_TIMEOUT_S):
                await self._qmp.connect(self._qmp_socket.dup())
        except (ConnectError, TimeoutError, AssertionError) as error:
            # The assertion is the library's, of a connection that stands: QEMU may end before it is looked at.
            await asyncio.wait([self.exited], timeout=1)  # its last words may still be on their way
            status = f"exit status {self.exited.result()}" if self.exited.done() else "no answer"
            raise UnavailableError(
                f"start {self._process.args[0] if isinstance(self._process.args, list) else 'QEMU'}",
                f"QEMU did not come up ({status}){self.last_words()}",
                "`taskvm doctor` tells what this host lacks",
            ) from error

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()
        self._release_lifeline()
        if not self.exited.done():
            self.exited.set_result(status)

    # Ending.

    def _release_lifeline(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def _close_state(self) -> None:
        if self._state_fd is not None:
            os.close(self._state_fd)
            self._state_fd = None


def _status(event: Message) -> str:
    data = event.get("data")
    return str(data.get("status")) if isinstance(data, dict) else ""


def _spawn(qemu: Qemu, shape: MachineShape, files: MachineFiles) -> Machine:
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as kept:
        ours: dict[str, socket.socket] = {}
        numbers: dict[str, int] = {}
        for name in ("qmp", "console", "control", "fs", "net"):
            ours[name], inherited = socket.socketpair()
            kept.enter_context(ours[name])
            theirs.enter_context(inherited)
            numbers[name] = inherited.fileno()
        lifeline_read, lifeline_write = os.pipe()
        theirs.callback(os.close, lifeline_read)
        kept.callback(os.close, lifeline_write)
        inherited_fds = [*numbers.values(), lifeline_read]
        state_fd = memory_fd = None
        if files.state is not None:
            state_fd = os.open(files.state, os.O_RDONLY | os.O_CLOEXEC)
            kept.callback(os.close, state_fd)
            inherited_fds.append(state_fd)
        if files.memory is not None and not files.share_memory:
            memory_fd = os.open(files.memory, os.O_RDONLY | os.O_CLOEXEC)
            kept.callback(os.close, memory_fd)
        command = _commands(qemu, shape, files, Descriptors(**numbers), lifeline_read)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=inherited_fds,
                cwd="/",
                # Python ignores SIGXFSZ, and QEMU must too: at its file size limit it is to get EFBIG, not to die.
                restore_signals=False,
                env={"LC_ALL": "C"},  # nothing of the user's environment: it may hold secrets
            )
        except OSError as error:
            raise HostError(f"start {command[0]}", error.strerror or str(error)) from error
        kept.pop_all()
    machine = Machine(shape, files, process, ours)
    machine._lifeline = lifeline_write
    machine._state_fd = state_fd
    machine.memory = memory_fd
    return machine


def _commands(
    qemu: Qemu, shape: MachineShape, files: MachineFiles, descriptors: Descriptors, lifeline: int
) -> list[str]:
    program = qemu_command(
        qemu.path,
        shape,
        boot=files.boot,
        disk=files.disk,
        memory=files.memory,
        share_memory=files.share_memory,
        incoming=files.incoming,
        descriptors=descriptors,
    )
    disk = files.disk
    writable = [*disk.layers[:1]]
    copy_on_write = None
    if files.memory is not None and files.share_memory:
        writable.append(files.memory)
    else:
        copy_on_write = files.memory
    return confine_command(
        confine_binary(),
        program,
        read=[
            *files.boot.files(incoming=files.incoming),
            *disk.layers[1:],
            *([disk.base] if disk.base else []),
        ],
        write=writable,
        copy_on_write=copy_on_write,
        file_size_bytes=files.disk_limit_bytes,
        data_size_bytes=shape.data_limit_bytes,
        lifeline=lifeline,
        accelerator=shape.accelerator,
    )
