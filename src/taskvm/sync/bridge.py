"""From threads that block to the one event loop behind them.

Rule 1: a process has one loop in one thread, started by the first use; `atexit` closes what is open and ends it.
Rule 2: code of the user never runs in the loop's thread: callbacks and iterators run in the thread that called, which
        waits for them and for the call's end.
Rule 3: what interrupts a waiting caller (Ctrl-C, a callback's exception) cancels the call, waits until it has
        ended, and is raised. A second Ctrl-C waits for nothing.
Rule 4: threads do not survive fork(2): what the parent made is refused in the child, which has a loop of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, ParamSpec, TypeVar

from taskvm.errors import SandboxStateError, TaskvmError

_P = ParamSpec("_P")
_T = TypeVar("_T")
Closer = Callable[[], Awaitable[None]]

# What the interpreter's exit waits for: a flush of mounts has 10 s (FLUSH_TIMEOUT_S), ending QEMU takes milliseconds.
# After it the machines die all the same, with the pipe that only this process holds.
EXIT_TIMEOUT_S = 20.0

_logger = logging.getLogger(__name__)


class Bridge:
    """The process's event loop in its thread, and what must be closed before it ends. Get it with `current`."""

    _current: Bridge | None = None
    _starting = threading.Lock()

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._closers: dict[object, Closer] = {}
        self._lasting: set[asyncio.Task[Any]] = set()
        self._stopping = asyncio.Event()
        self._ended = False
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, name="taskvm", daemon=True)

    @classmethod
    def current(cls) -> Bridge:
        """Return this process's bridge; the first use starts it."""
        with cls._starting:
            if cls._current is None:
                bridge = cls()
                bridge._thread.start()
                bridge._ready.result()
                atexit.register(bridge.stop)
                cls._current = bridge
            return cls._current

    def call(
        self, function: Callable[_P, Awaitable[_T]], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Run an asynchronous function on the loop and return what it returns. See Rule 3."""
        return Call(self).run(function, *args, **kwargs)

    def release(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run what closes something to its end, whoever interrupts the waiting for it.

        In a forked child and after the exit's own closing there is nothing to do: it is the parent's, or closed.
        """
        if self._pid == os.getpid() and not self._ended:
            Call(self, cancels=False).run(function)

    def leave(self, function: Callable[[], Awaitable[None]]) -> None:
        """Have the loop run `function` some time and tell nobody. Never blocks; nothing happens after its end."""
        if self._pid == os.getpid():
            with contextlib.suppress(SandboxStateError):
                self.submit(partial(_Work(function).begin, self.await_at_exit))

    def require_usable(self) -> None:
        """Raise SandboxStateError in a forked child, in the loop's own thread and when the interpreter exits."""
        operation = "use a sandbox"
        if self._pid != os.getpid():
            cause = f"process {self._pid} made it, and fork does not copy its threads"
            raise SandboxStateError(operation, cause, "Create one in this process")
        if threading.current_thread() is self._thread:
            cause = "this is the event loop's own thread, which would wait for itself"
            raise SandboxStateError(operation, cause, "Call it from another thread")
        if self._ended:
            raise SandboxStateError(operation, "the interpreter is exiting and has closed it")

    def submit(self, begin: Callable[[], None]) -> None:
        """Run `begin` in the loop's thread, soon."""
        try:
            self._ready.result().call_soon_threadsafe(begin)
        except RuntimeError as error:
            raise SandboxStateError("use a sandbox", "its event loop has ended") from error

    def await_at_exit(self, task: asyncio.Task[Any]) -> None:
        """Let the interpreter's exit wait for `task` instead of cancelling it. In the loop's thread only."""
        self._lasting.add(task)
        task.add_done_callback(self._lasting.discard)

    def own(self, key: object, close: Closer) -> None:
        """Close `key` at the interpreter's exit, unless it is disowned. In the loop's thread only."""
        self._closers[key] = close

    def disown(self, key: object) -> None:
        """Forget `key`: it is closed. In the loop's thread only."""
        self._closers.pop(key, None)

    def stop(self) -> None:
        """Close everything that is open and end the loop. Registered with `atexit`."""
        if self._ended or self._pid != os.getpid():
            return
        self._ended = True
        self.submit(self._stopping.set)
        self._thread.join()

    # In the loop's thread.

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            runner.get_loop().set_default_executor(_DaemonThreads())
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._ready.set_result(asyncio.get_running_loop())
        await self._stopping.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                closing = (close() for close in list(self._closers.values()))
                for error in await asyncio.gather(*closing, return_exceptions=True):
                    if error is not None and not isinstance(error, TaskvmError):
                        _logger.error("a sandbox could not be closed at exit", exc_info=error)
                if self._lasting:  # a close whose caller Ctrl-C has taken away
                    await asyncio.wait(self._lasting)

    def _forget_in_child(self) -> None:
        # Kept alive: the parent's loop shares its epoll descriptor with this copy, and must not be finalised.
        _of_parents.append(self)


_of_parents: list[Bridge] = []


def _after_fork_in_child() -> None:
    Bridge._starting = threading.Lock()
    if Bridge._current is not None:
        Bridge._current._forget_in_child()
        Bridge._current = None


os.register_at_fork(after_in_child=_after_fork_in_child)


class Call:
    """One blocking call. Without `cancels` an interruption stops the waiting only, and the work goes on to its end.

    `undo` gets what a work has made that was done when it was to be cancelled: nobody else has it.
    `callback` and `stream` make of the user's functions and iterators what the work may use: they run in `run`.
    """

    def __init__(
        self,
        bridge: Bridge,
        *,
        cancels: bool = True,
        undo: Callable[[Any], Awaitable[None]] | None = None,
    ) -> None:
        bridge.require_usable()
        self._bridge = bridge
        self._cancels = cancels
        self._undo = undo
        self._posts: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def run(self, function: Callable[_P, Awaitable[_T]], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run `function` on the loop and return what it returns, serving what it asks of this thread."""
        work = _Work(lambda: function(*args, **kwargs))
        work.ended.add_done_callback(lambda _: self._posts.put(None))
        try:
            self._bridge.submit(partial(work.begin, self._on_begun))
            while (post := self._posts.get()) is not None:
                post()
        except BaseException:
            if self._cancels:
                self._bridge.submit(work.cancel)
                with contextlib.suppress(CancelledError, TaskvmError):  # the interruption is told
                    failed = work.ended.exception()  # waits
                    if failed is None and self._undo is not None:
                        self._bridge.release(partial(self._undo, work.ended.result()))
            raise
        try:
            return work.ended.result()
        except CancelledError:
            raise SandboxStateError("use a sandbox", "the interpreter is exiting") from None

    def callback(self, function: Callable[[str], None]) -> Callable[[str], None]:
        """Return what calls `function` in the caller's thread, and does not wait for it."""
        return lambda line: self._posts.put(lambda: function(line))

    async def stream(self, source: Iterable[bytes]) -> AsyncIterator[bytes]:
        """Iterate over `source` in the caller's thread."""
        pieces = iter(source)
        while (data := await self._ask(lambda: next(pieces, None))) is not None:
            yield data

    def _on_begun(self, task: asyncio.Task[Any]) -> None:
        if not self._cancels:
            self._bridge.await_at_exit(task)

    async def _ask(self, question: Callable[[], bytes | None]) -> bytes | None:
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

        def post() -> None:
            value = question()
            self._bridge.submit(lambda: None if answer.done() else answer.set_result(value))

        self._posts.put(post)
        return await answer


class _Work(Generic[_T]):
    """One asynchronous function to be run: begun and cancelled in the loop's thread, `ended` anywhere."""

    def __init__(self, function: Callable[[], Awaitable[_T]]) -> None:
        self.ended: Future[_T] = Future()
        self._function = function
        self._context = contextvars.copy_context()
        self._task: asyncio.Task[_T] | None = None

    def begin(self, on_begun: Callable[[asyncio.Task[_T]], None]) -> None:
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(_awaited(self._function), context=self._context)
        self._task.add_done_callback(self._finish)
        on_begun(self._task)

    def cancel(self) -> None:
        if self._task is None:  # interrupted before it could begin
            self.ended.cancel()
        else:
            self._task.cancel()

    def _finish(self, task: asyncio.Task[_T]) -> None:
        if task.cancelled():
            self.ended.cancel()
        elif (error := task.exception()) is not None:
            self.ended.set_exception(error)
        else:
            self.ended.set_result(task.result())


class _DaemonThreads(ThreadPoolExecutor):
    """Runs each job in a daemon thread. A usual pool takes no job once `atexit` runs, and closing a sandbox has one.

    The engine hands over a few jobs in a sandbox's life; a thread costs about 50 µs.
    """

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        future: Future[_T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001  # told to whoever waits, as the class above does
                future.set_exception(error)

        threading.Thread(target=work, name="taskvm-job", daemon=True).start()
        return future


# The task needs a coroutine, and an `Awaitable` may be something else. Called in it: what is raised at once is the
# call's as well, and of a task that is cancelled before its first step there is nothing that was never awaited.
async def _awaited(function: Callable[[], Awaitable[_T]]) -> _T:
    return await function()
