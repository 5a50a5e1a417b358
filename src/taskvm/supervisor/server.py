"""The supervisor: one process per user that holds sandboxes which outlive the command lines that started them.

It listens on a socket of its user's, serves each connection in a task of its own, and ends when it has held nothing for
a while, when it is asked to, or by SIGTERM; its sandboxes end with it, by its care or by the lifeline of each machine.

Rule 1: nothing that one client does, or does not do, stops another.
Rule 2: an error of ours becomes the client's; any other is a bug: it goes to the log, and ends that call only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial

from taskvm.errors import HostError, TaskvmError, UsageError
from taskvm.supervisor.holding import Recipe
from taskvm.supervisor.operations import OPERATIONS, AnsweredError
from taskvm.supervisor.place import Place, peer_uid
from taskvm.supervisor.ports import ClientGoneError, Service
from taskvm.supervisor.roster import Roster
from taskvm.wire.supervision import (
    ANY_VERSION,
    Answer,
    Greeting,
    MessageError,
    Refusal,
    StartRequest,
    SupervisorStatus,
    decode,
    name_operation,
    raw,
)

# More than a person's windows and scripts; each costs some descriptors and at most a MiB.
MAX_CONNECTIONS = 256
# From the connection to the request: a client of ours says it at once.
REQUEST_TIMEOUT_S = 10.0
# A supervisor without sandboxes stays so long, for the next command: starting one takes half a second.
LINGER_S = 60.0
DISMISS_S = 2.0
_TICK_S = 0.5

RecipeMaker = Callable[[StartRequest, Callable[[str], None]], Recipe]


class Server:
    """Serves one place until it should end. `make_recipe` makes of a request the sandbox to be started."""

    def __init__(
        self, place: Place, make_recipe: RecipeMaker, version: str, linger_s: float = LINGER_S
    ) -> None:
        self.roster: Roster = Roster()
        self.make_recipe = make_recipe
        self.log: logging.Logger = logging.getLogger(__name__)
        self._place = place
        self._version = version
        self._linger_s = linger_s
        self._serving: set[asyncio.Task[None]] = set()
        self._started_s = self._last_used_s = time.monotonic()
        self._stopping = asyncio.Event()
        self._socket_inode: int | None = None

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Serve; `on_ready` is called once clients can connect."""
        listener = self._place.listen()
        self._socket_inode = self._place.socket_inode
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        self.log.info("supervisor %s serves %s", self._version, self._place.directory)
        try:
            async with asyncio.TaskGroup() as group:
                accepting = group.create_task(self._accept(listener, group))
                on_ready()
                await self._wait_end()
                accepting.cancel()
                self._leave_place()
                await self.roster.close("the supervisor was stopped")
                await self._dismiss()
        finally:
            listener.close()
            self.log.info("supervisor ended")

    def status(self) -> SupervisorStatus:
        """Return what `taskvm supervisor status` tells."""
        return SupervisorStatus(
            version=self._version,
            pid=os.getpid(),
            age_s=time.monotonic() - self._started_s,
            sandboxes=sum(each.running for each in self.roster.all()),
            directory=str(self._place.directory),
        )

    async def shut_down(self) -> None:
        """End every sandbox, and then the supervisor; that is done, too, when who asks for it waits no longer."""
        self._leave_place()
        self._stopping.set()
        await self.roster.close("the supervisor was stopped")

    # How.

    async def _wait_end(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _TICK_S)
            if self._place.socket_inode != self._socket_inode:
                self.log.warning("the socket is gone: no command can reach this supervisor")
                return
            now_s = time.monotonic()
            if self._serving or not self.roster.empty:
                self._last_used_s = now_s
            elif now_s - self._last_used_s > self._linger_s:
                return

    def _leave_place(self) -> None:
        """Let the next command start another supervisor. A socket that is not this one's stays."""
        if self._place.socket_inode == self._socket_inode is not None:
            self._place.unlisten()
        self._socket_inode = None

    async def _dismiss(self) -> None:
        """Let who is still connected be told of the end, and wait for nobody who does not listen."""
        if self._serving:
            await asyncio.wait(self._serving, timeout=DISMISS_S)
        for task in self._serving:
            task.cancel()

    async def _accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor is free: who holds some will end
                self.log.warning("accept: %s", error)
                await asyncio.sleep(_TICK_S)
                continue
            if peer_uid(sock) != os.geteuid():
                self.log.warning("refused a connection of the user %d", peer_uid(sock))
                sock.close()
            elif len(self._serving) >= MAX_CONNECTIONS:
                self.log.warning("refused a connection: there are %d", MAX_CONNECTIONS)
                sock.close()
            else:
                task = group.create_task(self._serve(sock))
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)

    async def _serve(self, sock: socket.socket) -> None:
        """Serve one client: one request, in this task, until it has left."""
        service = await Service.open(sock)  # cannot fail: the socket is connected
        service.on_gone = partial(_cancel, asyncio.current_task())
        try:
            service.greet(Greeting(version=self._version, pid=os.getpid()))
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                payload = await service.request
            await self._answer(service, payload)
        except (ClientGoneError, TimeoutError):
            pass
        except asyncio.CancelledError:
            if not service.gone:
                raise
        finally:
            service.close()

    async def _answer(self, service: Service, payload: bytes) -> None:
        name = ""
        try:
            name = name_operation(payload)
            result = await self._perform(service, name, payload)
            service.answer(Answer(result=raw(result)))
        except AnsweredError:
            return
        except MessageError as error:
            refusal = UsageError(
                f"ask the supervisor for {name!r}",
                str(error),
                "If taskvm has changed since it was started: `taskvm supervisor stop`",
            )
            service.answer(Answer(error=Refusal.of(refusal)))
        except TaskvmError as error:
            service.answer(Answer(error=Refusal.of(error)))
        except ClientGoneError:
            raise
        except Exception:  # Rule 2
            self.log.exception("%s failed", name)
            bug = HostError(
                f"{name} in the supervisor", "it failed unexpectedly", f"See {self._place.log}"
            )
            service.answer(Answer(error=Refusal.of(bug)))

    async def _perform(self, service: Service, name: str, payload: bytes) -> object:
        if name not in OPERATIONS:
            raise MessageError("there is no such operation")
        kind, function = OPERATIONS[name]
        if name in ANY_VERSION:
            return await function(self, service, kind())
        return await function(self, service, decode(payload, kind))


def _cancel(task: asyncio.Task[object] | None) -> None:
    assert task is not None, "a client is served in a task"
    task.cancel()
