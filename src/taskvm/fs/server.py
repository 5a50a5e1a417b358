"""The host's end of the port `taskvm.fs`: FUSE messages in, answers out (docs/protocol-control.md, The fs port).

One daemon thread reads the port and serves the mounts whose providers are `prompt`, with blocking calls, so that the
user's event loop does not wait for a disk; each other mount has a thread of its own (fs/lane.py), so that neither does
anybody else. Requests of a mount are served in the order of their arrival, an fsync aside (fs/aside.py), and what a
request needs is only held until its answer is sent: a guest that does not read its answers stops its own threads and
nothing else.

At rest (from `quiesce` or a mount that is taken up again, until `resume`) nothing is sent that was not asked for: what
providers have to tell is kept, and their sources are not watched.

Locks, in this order: `_serving` while the port's own thread serves a request or a source, so that a mount is never
removed under one, and while the table of mounts changes; those of a lane; `_sending` while bytes go to the socket, so
that frames of different threads do not mix. The server's own thread sends without `_serving`, so who waits for it waits
for a provider and never for the guest.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from taskvm.errors import (
    GuestProtocolError,
    SandboxLostError,
    SandboxStateError,
    TaskvmError,
    UsageError,
)
from taskvm.fs.aside import Aside
from taskvm.fs.attention import Attention, Pauses
from taskvm.fs.lane import Lane
from taskvm.fs.outlet import MAX_IOVECS, send_all, unread
from taskvm.fs.patience import Answers, Patience
from taskvm.fs.provider import Provider, Source
from taskvm.fs.session import Reply, Session
from taskvm.wire.frames import (
    GUEST_STREAM_BIT,
    PORT_FS,
    Frame,
    FrameDecoder,
    FrameError,
    FrameType,
    encode_header,
)
from taskvm.wire.fuse import FuseError
from taskvm.wire.fuse_replies import encode_error

QUIESCE_TIMEOUT_S = 30.0  # as port.py's
# One read of the socket: what a Unix socket holds by default (net.core.rmem_default) is a little less.
RECEIVE_SIZE = 256 * 1024
REST_AFTER_S = 1.0
# How long the end of a mount waits for a provider that is being called.
CLOSE_PATIENCE_S = 2.0
# Answers are sent when this much is ready; at most one answer (1 MiB) comes on top of it.
SEND_SIZE = 256 * 1024
# A short answer is cheaper to copy behind its header than to name to sendmsg.
_COPY_BELOW = 4096
# fuse_in_header: what an answer to a mount that is gone needs to know.
_UNIQUE = struct.Struct("<8xQ")

_NO_RETURN = "bring the guest's port taskvm.fs to rest: a provider does not return"
_NO_ANSWER = "bring the guest's port taskvm.fs to rest: no answer to QUIESCE"
_NO_READER = "bring the guest's port taskvm.fs to rest: answers are not read"

_log = logging.getLogger("taskvm.fs")


def _nobody(error: Exception) -> None:
    """Nobody asked to be told."""


class FsServer:
    """Serves the guest's file system port `sock`, which it takes over, from the moment it exists.

    `on_failure` is called once, from the server's thread, when the guest broke the protocol.
    """

    def __init__(
        self, sock: socket.socket, *, on_failure: Callable[[Exception], None] = _nobody
    ) -> None:
        self.on_failure = on_failure
        self.frames: int = 0  # that have moved, in either direction
        self._sock = sock
        self._sock.setblocking(True)
        self._mounts: dict[int, Session] = {}  # that the port's thread serves
        self._lanes: dict[int, Lane] = {}  # the others
        self._names: dict[int, str] = {}  # what errors call them
        self._serving = threading.Lock()
        self._sending = threading.Lock()
        self._answers = Answers()  # to QUIESCE
        self._ended = threading.Event()
        self._closed = False
        self._reported: set[tuple[str, type[BaseException]]] = set()
        self._outgoing: list[bytes] = []
        self._outgoing_size = 0
        self._held: list[bytes] | None = None  # what is to be told, at rest; under `_sending`
        self._attention = Attention(self._sock.fileno())
        self._pauses = Pauses(REST_AFTER_S)
        self._aside = Aside()
        self._thread = threading.Thread(target=self._run, name="taskvm-fs", daemon=True)
        self._thread.start()

    # What the sandbox calls, from any thread.

    def add_mount(
        self, mount_id: int, provider: Provider, state: bytes | None = None, *, name: str = ""
    ) -> None:
        """Serve the stream `mount_id` from `provider.opened()`. Call it before the guest mounts.

        With `state`, of `export_mounts`, the guest has mounted it before it was saved; call it before `resume`.
        Errors call the mount `name`. Raises UsageError when this is not the state of such a mount.
        """
        if not 0 < mount_id < GUEST_STREAM_BIT:
            raise UsageError(f"add the mount {mount_id}", "the id is out of range", "Count from 1")
        with self._serving:
            if self._closed:
                raise SandboxStateError(f"add the mount {mount_id}", "the file server is closed")
            if mount_id in self._names:
                raise UsageError(f"add the mount {mount_id}", "the id is taken", "Remove it first")
            self._names[mount_id] = name or str(mount_id)
        try:
            session = self._open(mount_id, provider, state)
        except BaseException:
            del self._names[mount_id]
            raise
        with self._serving:
            self._add(mount_id, session)

    def _open(self, mount_id: int, provider: Provider, state: bytes | None) -> Session:
        """Open a provider: without a lock, because it may wait for whatever serves it."""
        opened = provider.opened()

        def tell(message: bytes) -> None:
            self._tell(mount_id, message)

        opened.changes = lambda change: tell(Session.notification(change))

        def aside(finish: Callable[[], Reply]) -> bool:
            return self._aside.run(lambda: self._answer(mount_id, finish()))

        session = Session(opened, self._report, tell, aside if opened.prompt else None)
        if state is not None:
            with self._serving:
                self._rest(Patience(QUIESCE_TIMEOUT_S))
            _take_up(self._names[mount_id], session, state)
        return session

    def _add(self, mount_id: int, session: Session) -> None:
        if self._closed:
            session.close()
            raise SandboxStateError(f"add the mount {mount_id}", "the file server was closed")
        if session.provider.prompt:
            self._mounts[mount_id] = session
        else:
            self._lanes[mount_id] = Lane(
                session,
                self._names[mount_id],
                answer=functools.partial(self._answer, mount_id),
                fail=self._end,
                rest_after_s=REST_AFTER_S,
            )
        if self._held is None:
            self._watch(mount_id)

    def remove_mount(self, mount_id: int) -> None:
        """Stop serving a mount and close its provider; the guest gets ENODEV from then on. Idempotent."""
        with self._serving:
            self._unwatch(mount_id)
            session = self._mounts.pop(mount_id, None)
            lane = self._lanes.pop(mount_id, None)
            self._names.pop(mount_id, None)
            if session is not None:
                session.close()
        if lane is not None:
            lane.close()
            lane.join(CLOSE_PATIENCE_S)

    def export_mounts(self) -> dict[int, bytes]:
        """Return what `add_mount` of another server needs to serve on what the guest has mounted; only at rest.

        Raises UsageError for a mount whose provider cannot be taken up again.
        """
        with self._serving:
            names = self._names
            states = {number: _export(names[number], one) for number, one in self._mounts.items()}
        for number, lane in list(self._lanes.items()):
            with lane.serving:
                states[number] = _export(names[number], lane.session)
        return states

    def quiesce(self, given_up: threading.Event | None = None) -> None:
        """Return when the guest's side is at rest and has taken all answers; nothing is told until `resume`.

        Raises TimeoutError after QUIESCE_TIMEOUT_S, or soon after `given_up` is set; SandboxLostError when the port
        ends before.
        """
        rest = Patience(QUIESCE_TIMEOUT_S, given_up)
        if any(lane.is_late for lane in self._lanes.values()):
            raise TimeoutError(_NO_RETURN)
        with _taken(self._serving, rest, _NO_RETURN):
            self._rest(rest)
        # One that was given up on may be answered only now.
        number = self._send_control(FrameType.QUIESCE, rest, self._answers.ask)
        rest.wait(lambda span_s: self._answers.wait_for(number, span_s), _NO_ANSWER)
        if self._ended.is_set():
            raise _closed()
        for lane in list(self._lanes.values()):
            rest.wait(lane.wait_idle, _NO_RETURN)
        rest.wait(self._is_read, _NO_READER)

    def resume(self) -> None:
        """Let the guest's side go on after `quiesce`, and tell it what has changed meanwhile."""
        self._send_control(FrameType.RESUME, Patience(QUIESCE_TIMEOUT_S))
        with self._sending:
            held, self._held = self._held or [], None
        self._send(b"".join(held))
        with self._serving:
            for number in [*self._mounts, *self._lanes]:
                self._watch(number)

    def close(self) -> None:
        """End the thread and close the socket and every provider. Idempotent.

        A provider that does not return is left behind after CLOSE_PATIENCE_S, and closed when it does.
        """
        self._closed = True
        with suppress(OSError):  # the other side may have been faster
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread from recv and sendmsg
        self._aside.close()
        if self._thread is not threading.current_thread():
            self._thread.join()
        with self._serving:
            while self._mounts:
                _id, session = self._mounts.popitem()
                session.close()
            lanes, self._lanes = list(self._lanes.values()), {}
        for lane in lanes:
            lane.close()
        deadline = time.monotonic() + CLOSE_PATIENCE_S
        for lane in lanes:
            lane.join(deadline - time.monotonic())
        self._attention.close()
        # The number that a thread is about to send to must not become another file's.
        with self._sending:
            self._sock.close()

    def _is_read(self, span_s: float) -> bool:
        """Whether the guest has taken all that was sent (SIOCOUTQ), now or in a moment."""
        try:
            if not unread(self._sock):
                return True
        except (OSError, ValueError) as error:  # of a number that is none any more
            raise _closed() from error
        time.sleep(min(span_s, 0.001))
        return False

    # What the providers watch. Under `_serving`.

    def _watch(self, mount_id: int) -> None:
        if mount_id in self._lanes:
            self._lanes[mount_id].watch()
        else:
            self._attention.watch(self._mounts[mount_id].provider.sources())

    def _unwatch(self, mount_id: int) -> None:
        if mount_id in self._lanes:
            self._lanes[mount_id].unwatch()
        elif mount_id in self._mounts:
            self._attention.unwatch(self._mounts[mount_id].provider.sources())

    def _rest(self, patience: Patience) -> None:
        with _taken(self._sending, patience, _NO_READER):
            if self._held is None:
                self._held = []
        for number in [*self._mounts, *self._lanes]:
            self._unwatch(number)

    # The thread.

    def _run(self) -> None:
        try:
            self._serve()
        except OSError as error:
            if not self._closed:
                _log.info("the guest's file system port ended: %s", error)
        except Exception as error:  # noqa: BLE001 - a guest whose files nobody serves would wait for ever
            self._end(error)
        finally:
            self._ended.set()
            self._answers.end()

    def _serve(self) -> None:
        decoder = FrameDecoder()
        buffer = bytearray(RECEIVE_SIZE)
        while count := self._receive(buffer):
            for frame in decoder.feed(memoryview(buffer)[:count]):
                self._handle(frame)
                if self._outgoing_size >= SEND_SIZE or len(self._outgoing) >= MAX_IOVECS:
                    self._flush()
            self._flush()

    def _receive(self, buffer: bytearray) -> int:
        """Wait for bytes of the port, and serve the sources meanwhile: what they tell comes before the next answer."""
        while True:
            readable, sources = self._attention.wait(self._until(self._pauses.left_s))
            self._expire()
            if sources:
                begun = time.monotonic()
                for source in sources:
                    self._attend(source)
                self._attention.spent(time.monotonic() - begun)
            if self._pauses.is_due():
                self._let_rest()
            if readable:
                self._pauses.asked()
                return self._sock.recv_into(buffer)

    def _let_rest(self) -> None:
        with self._serving:
            for session in self._mounts.values():
                session.rest()

    def _attend(self, source: Source) -> None:
        with self._serving:
            if not self._attention.is_watched(source):
                return  # its mount was just removed
            try:
                source.ready()
            except Exception as error:  # noqa: BLE001 - a provider's bug must not end the sandbox
                self._report("the source of a provider", error)
                self._attention.unwatch([source])
        self._flush()

    def _until(self, timeout_s: float | None) -> float | None:
        """Return for how long the thread may wait before a lane has to be looked at."""
        due = min((lane.due for lane in list(self._lanes.values())), default=math.inf)
        if due == math.inf:
            return timeout_s
        until = max(0.0, due - time.monotonic())
        return until if timeout_s is None else min(until, timeout_s)

    def _expire(self) -> None:
        """Answer for the providers that take too long."""
        for number, lane in list(self._lanes.items()):
            for reply in lane.expire():
                self._queue(number, reply)
        self._flush()

    def _handle(self, frame: Frame) -> None:
        if frame.type is FrameType.QUIESCED and frame.stream == 0:
            self._aside.finish()
            self._flush()
            if not self._answers.take():
                raise FrameError("QUIESCED without QUIESCE")
            return
        if frame.type is not FrameType.FUSE:
            raise FrameError(f"a {frame.type.name} frame has no business on this port")
        self.frames += 1
        lane = self._lanes.get(frame.stream)
        if lane is not None:
            reply = lane.submit(bytes(frame.payload))
        else:
            reply = self._serve_at_once(frame.stream, memoryview(frame.payload))
        if reply is not None:
            self._queue(frame.stream, reply)

    def _serve_at_once(self, mount_id: int, message: memoryview) -> Reply | None:
        with self._serving:
            session = self._mounts.get(mount_id)
            return session.handle(message) if session is not None else _gone(message)

    def _queue(self, mount_id: int, reply: Reply) -> None:
        head, body = reply if isinstance(reply, tuple) else (reply, b"")
        header = encode_header(FrameType.FUSE, 0, mount_id, len(head) + len(body))
        if len(body) < _COPY_BELOW:
            self._outgoing.append(header + head + body)
        else:
            self._outgoing += (header + head, body)
        self._outgoing_size += len(head) + len(body)

    def _answer(self, mount_id: int, reply: Reply) -> None:
        head, body = reply if isinstance(reply, tuple) else (reply, b"")
        header = encode_header(FrameType.FUSE, 0, mount_id, len(head) + len(body))
        # A port that ended has nobody left who waits for it.
        with self._sending, suppress(OSError):
            send_all(self._sock, [header + head, body])

    def _flush(self) -> None:
        if self._outgoing:
            outgoing, self._outgoing, self._outgoing_size = self._outgoing, [], 0
            with self._sending:
                send_all(self._sock, outgoing)

    def _end(self, error: Exception) -> None:
        if isinstance(error, FrameError | FuseError):
            self._fail(GuestProtocolError(PORT_FS, str(error)))
            return
        self._report("the file server", error)
        self._fail(SandboxLostError("serve the guest's files", "a bug ended the file server"))

    def _fail(self, error: TaskvmError) -> None:
        if not self._closed:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self.on_failure(error)

    def _report(self, operation: str, error: BaseException) -> None:
        key = (operation, type(error))
        if key not in self._reported:
            self._reported.add(key)
            # Without the exception's text, which may hold the guest's names and contents.
            _log.error(
                "%s failed with %s, a bug: the guest got EIO", operation, type(error).__name__
            )

    # Frames of other threads.

    def _tell(self, mount_id: int, message: bytes) -> None:
        self.frames += 1
        told = encode_header(FrameType.FUSE, 0, mount_id, len(message)) + message
        if threading.current_thread() is self._thread and self._held is None:
            self._outgoing.append(told)  # behind the answers before it, and outside `_serving`
            self._outgoing_size += len(told)
        else:
            self._send(told)

    def _send(self, told: bytes) -> None:
        with self._sending:
            if self._held is not None:
                self._held.append(told)
                return
            # A port that ended has nobody left who could remember anything wrongly.
            with suppress(OSError):
                self._sock.sendall(told)

    def _send_control(
        self, kind: FrameType, patience: Patience, count: Callable[[], int] = lambda: 0
    ) -> int:
        """Send a frame about the port itself. Return what `count` says, which is asked when it is sure to be sent."""
        operation = f"send {kind.name} to the guest's port {PORT_FS}"
        with _taken(self._sending, patience, f"{operation}: the guest does not read"):
            number = count()
            try:
                self._sock.sendall(encode_header(kind, 0, 0, 0))
            except OSError as error:
                raise SandboxLostError(operation, error.strerror or str(error)) from error
        return number


@contextmanager
def _taken(lock: threading.Lock, patience: Patience, complaint: str) -> Iterator[None]:
    """Take a lock as long as there is patience. Raises TimeoutError with `complaint`."""
    patience.wait(lambda span_s: lock.acquire(timeout=span_s), complaint)
    try:
        yield
    finally:
        lock.release()


def _export(name: str, session: Session) -> bytes:
    try:
        return session.export()
    except OSError as error:
        raise UsageError(
            f"save the mount {name}",
            f"{type(session.provider).__name__} cannot be taken up again ({error.strerror})",
            "Save the disk without the memory, or mount a HostDir there",
        ) from error


def _take_up(name: str, session: Session, state: bytes) -> None:
    try:
        session.resume(state)
    except (ValueError, OSError) as error:
        session.provider.close()
        raise UsageError(
            f"take up the saved mount {name}",
            f"its state is not one of {type(session.provider).__name__}",
            "Mount what was mounted there when the guest was saved",
        ) from error


def _gone(message: memoryview) -> Reply | None:
    """Answer for a mount that was removed while its requests were under way."""
    return encode_error(_UNIQUE.unpack_from(message)[0], errno.ENODEV)


def _closed() -> SandboxLostError:
    return SandboxLostError("bring the guest's port taskvm.fs to rest", "it was closed")
