"""A thread of its own for one mount whose provider may be slow: a network file system, or code of the user's.

Rule 1: calls come one at a time, in the order of their requests. What the host changes is looked at between any two,
    so that a guest which asks without a pause hears of it.
Rule 2: a request that takes longer than `request_deadline_s` is answered ETIMEDOUT, and so is all that waits behind it
    or is asked before it returns. What it does in the end is done; its answer is dropped, and the references that the
    guest never heard of are given back.
Rule 3: what waits is bounded by MAX_WAITING; beyond that, ENOMEM. A FORGET that finds no room is dropped.
Rule 4: a provider is closed by the thread that calls it, when the last call has returned: nobody has to wait for that.

Locks, in this order: `serving` while the provider is called; `_state` for what waits and what is under way.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

from taskvm.fs.attention import Attention, Pauses
from taskvm.fs.provider import Source
from taskvm.fs.session import SILENT, Reply, Session
from taskvm.wire.fuse import Opcode
from taskvm.wire.fuse_replies import encode_error

# The kernel has at most 64 requests (session.BACKGROUND) of 1 MiB under way that no program waits for; each other one
# holds up a thread of the guest.
MAX_WAITING = 96 * 1024 * 1024
# What one message costs besides its bytes: as an object, and in the queue.
MESSAGE_COST = 128
_OPCODE_AND_UNIQUE = struct.Struct("<4xIQ")

_log = logging.getLogger("taskvm.fs")


class Lane:
    """Serves the mount that the log calls `name`.

    `answer` gets each reply and may block; `fail` gets what ends the sandbox.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        *,
        answer: Callable[[Reply], None],
        fail: Callable[[Exception], None],
        rest_after_s: float,
    ) -> None:
        self.session = session
        self._name = name
        self.serving = threading.Lock()
        self._answer = answer
        self._fail = fail
        self._pauses = Pauses(rest_after_s)
        self._state = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._current = b""  # the request that is under way
        self._due = math.inf  # when it takes too long
        self._late = False  # whether it has been answered for the provider
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)  # one for each request
        self._attention = Attention(self._wake)
        self._thread = threading.Thread(target=self._run, name="taskvm-fs-lane", daemon=True)
        self._thread.start()

    # What the server calls, from any thread.

    def submit(self, message: bytes) -> Reply | None:
        """Take a request; return its answer if it cannot be served."""
        opcode, unique = _OPCODE_AND_UNIQUE.unpack_from(message)
        cost = len(message) + MESSAGE_COST
        with self._state:
            if self._late and opcode not in SILENT:
                return encode_error(unique, errno.ETIMEDOUT)
            if self._size + cost > MAX_WAITING:
                return None if opcode in SILENT else encode_error(unique, errno.ENOMEM)
            self._waiting.append(message)
            self._size += cost
            self._post()
        return None

    @property
    def due(self) -> float:
        """When (of time.monotonic) a request takes too long, at the earliest; infinite when none has been asked."""
        with self._state:
            if self._due < math.inf or not self._waiting:
                return self._due
            return time.monotonic() + self.session.provider.request_deadline_s  # about to begin

    @property
    def is_late(self) -> bool:
        """Whether a request is under way that took too long."""
        return self._late

    def expire(self) -> list[Reply]:
        """Return the answers to all that has been asked, if the request that is under way takes too long."""
        with self._state:
            if time.monotonic() < self._due:
                return []
            self._due, self._late = math.inf, True
            asked = [self._current, *self._waiting]
            self._waiting = deque(one for one in self._waiting if _head(one)[0] in SILENT)
            self._size = sum(len(one) + MESSAGE_COST for one in self._waiting)
        heads = [_head(one) for one in asked]
        _log.warning(
            "the mount %s has not answered %s for %g s: the guest gets ETIMEDOUT until it does",
            self._name,
            next((one.name for one in Opcode if one == heads[0][0]), str(heads[0][0])),
            self.session.provider.request_deadline_s,
        )
        return [encode_error(one, errno.ETIMEDOUT) for opcode, one in heads if opcode not in SILENT]

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until all has been answered; tell whether that came to pass in time."""
        with self._state:
            return self._state.wait_for(lambda: not self._current and not self._waiting, timeout_s)

    def watch(self) -> None:
        """Attend to what the provider watches."""
        self._attention.watch(self.session.provider.sources())

    def unwatch(self) -> None:
        """Leave what the provider watches alone."""
        self._attention.unwatch(self.session.provider.sources())

    def close(self) -> None:
        """Serve nothing more. The thread closes the provider and ends when it can. Idempotent."""
        with self._state:
            self._closed = True
            self._waiting.clear()
            self._size = 0
            self._post()

    def join(self, timeout_s: float) -> None:
        """Wait until the provider is closed, but no longer than that."""
        if self._thread is not threading.current_thread():
            self._thread.join(max(0.0, timeout_s))

    def _post(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    # The thread.

    def _run(self) -> None:
        try:
            self._serve_all()
        except Exception as error:  # noqa: BLE001 - a guest whose files nobody serves would wait for ever
            self._fail(error)
        finally:
            self._end()

    def _serve_all(self) -> None:
        while not self._closed:
            asked, sources = self._attention.wait(self._pauses.left_s)
            if sources:
                self._attend(sources)
            self._let_rest()
            if asked:
                os.eventfd_read(self._wake)
                if message := self._next():
                    self._pauses.asked()
                    self._serve(message)

    def _let_rest(self) -> None:
        if self._pauses.is_due():
            with self.serving:
                self.session.rest()

    def _attend(self, sources: list[Source]) -> None:
        begun = time.monotonic()
        for source in sources:
            with self.serving:
                if self._attention.is_watched(source) and not self.session.attend(source):
                    self._attention.unwatch([source])
        self._attention.spent(time.monotonic() - begun)

    def _next(self) -> bytes:
        with self._state:
            if self._closed or not self._waiting:
                return b""
            self._current = self._waiting.popleft()
            self._size -= len(self._current) + MESSAGE_COST
            self._due = time.monotonic() + self.session.provider.request_deadline_s
            return self._current

    def _serve(self, message: bytes) -> None:
        with self.serving:
            reply = self.session.handle(memoryview(message))
            with self._state:
                late, self._due = self._late, math.inf
            if late:
                self.session.take_back()
                _log.warning("the mount %s answers again", self._name)
        if reply is not None and not late:
            self._answer(reply)
        with self._state:
            self._current, self._late = b"", False
            self._state.notify_all()

    def _end(self) -> None:
        with self.serving:
            self.unwatch()
            self.session.close()
        self._attention.close()
        with self._state:
            os.close(self._wake)
            self._wake = -1


def _head(message: bytes) -> tuple[int, int]:
    opcode, unique = _OPCODE_AND_UNIQUE.unpack_from(message)
    return opcode, unique
