"""The host's side of the control port: calls into the guest, each on a stream of its own (docs/protocol-control.md).

`Control` matches the guest's frames to the calls that wait for them and refuses what nobody asked for. It holds no
policy and no knowledge of single operations: those are in process.py and files.py.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import msgspec

from taskvm.errors import GuestError, SandboxLostError, SandboxStateError
from taskvm.port import FramePort, Inlet, Outlet, StreamReset, check_fits
from taskvm.wire import control as messages
from taskvm.wire.frames import (
    GUEST_STREAM_BIT,
    MAX_MAP,
    PORT_CONTROL,
    PROTOCOL_VERSION,
    Frame,
    FrameType,
    decode_u32,
    encode_u32,
)

# How long one operation may take. Most need well under a millisecond of the agent's own time; what runs into this
# waits for something else, such as a mount that does not answer.
REPLY_TIMEOUT_S = 60.0
# The agent answers a ping in its loop's own thread, whatever its operations wait for. A guest that swaps, or is starved
# of CPU by 50 neighbours, took 14 s; after this it is taken for dead.
PROBE_TIMEOUT_S = 30.0
_CANCELED = 125  # ECANCELED
_TIMED_OUT = 110  # ETIMEDOUT in asm-generic/errno.h
# A reset call may have frames under way; its number is not used again, so they are dropped. More streams than this
# in flight is our own bug.
MAX_STREAMS = 4096

_A = TypeVar("_A", bound=messages._Answer)


class ControlClosedError(SandboxLostError):
    """Raised to what still waits for the guest when its owner closes the sandbox."""


class CommandState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command that ran when its guest was saved: how many bytes it may still send, by channel."""

    stream: int
    credits: dict[int, int]


class ControlState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the host knows of a guest's control port at rest, for whoever talks to that guest next.

    `others` are the streams that are not running commands: nobody waits for them any more.
    """

    next_stream: int
    highest_stream: int
    commands: list[CommandState]
    others: list[int]


class Call:
    """One stream that the host opened: its reply, its flows, and for an exec its exit.

    A `passive` one waits for what may never come: it is no activity of the sandbox. An `urgent` one was sent although
    the port may be held.
    """

    def __init__(
        self,
        control: Control,
        stream: int,
        operation: str,
        *,
        urgent: bool = False,
        passive: bool = False,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.stream = stream
        self.operation = operation
        self.passive = passive
        self.reply: asyncio.Future[bytes] = loop.create_future()
        self.exited: asyncio.Future[messages.Exited] = loop.create_future()
        self.inlets: dict[int, Inlet] = {}
        self.outlet: Outlet = Outlet(control.port, stream, 0)
        self._control = control
        self._urgent = urgent

    def inlet(self, channel: int) -> Inlet:
        """Open the receiving end of `channel`, before the guest can send on it."""
        self.inlets[channel] = Inlet(self._control.port, self.stream, channel)
        return self.inlets[channel]

    async def answer(self, kind: type[_A], timeout_s: float | None = None) -> _A:
        """Wait for the REPLY, REPLY_TIMEOUT_S if nothing else is said, and return it as `kind`.

        Raises GuestError when the operation failed, or does not end (ETIMEDOUT) though the guest's agent is well;
        SandboxLostError when the guest does not answer or is gone.
        """
        await self._control.wait_awake()  # then its time begins
        timeout_s = REPLY_TIMEOUT_S if timeout_s is None else timeout_s
        # Not asyncio.timeout: after this program itself stood still (Ctrl-Z), the answer is there and counts.
        await asyncio.wait([self.reply], timeout=timeout_s)
        if not self.reply.done():
            self.forget(errno=_TIMED_OUT)
            await self._control.probe(self.operation)
            raise GuestError(self.operation, _TIMED_OUT, f"the reply within {timeout_s:g} s")
        try:
            payload = self.reply.result()
        except StreamReset as error:
            raise GuestError(self.operation, error.errno or 5, "reset") from error
        try:
            reply = messages.decode(payload, kind)
        except messages.AnswerError as error:
            self._control.port.fail(f"reply to {self.operation}: {error}")
            raise SandboxLostError(self.operation, "the guest answered nonsense") from error
        if isinstance(reply, messages.Failure):
            self._control.drop(self.stream)
            raise GuestError(self.operation, reply.errno, reply.call)
        return reply

    def send_signal(self, request: messages.SignalRequest | messages.ResizeRequest) -> None:
        """Send SIGNAL about this running exec."""
        self._control.port.send(FrameType.SIGNAL, 0, self.stream, messages.encode(request))

    async def settle(self) -> None:
        """Wait until the guest has dealt with every frame that was sent before. Raises SandboxLostError."""
        await self._control.request(messages.PingRequest(), messages.Done, self.operation)

    async def wait_awake(self) -> None:
        """Wait while the machine stands still by its owner's will: no time that a guest has runs meanwhile."""
        await self._control.wait_awake()

    def forget(self, errno: int | None = None) -> None:
        """Drop the stream, telling the guest to end it when `errno` is given. Idempotent."""
        if self._control.drop(self.stream) and errno is not None:
            try:
                # Never before its OPEN, which may be held.
                self.outlet.reset(errno, urgent=self._urgent)
            except SandboxLostError:
                return

    def fail_port(self, reason: str) -> None:
        """The guest broke the protocol on this stream: its sandbox is ended, with `reason`."""
        self._control.port.fail(reason)

    def fail(self, error: Exception) -> None:
        """End everything that waits on this call."""
        for future in (self.reply, self.exited):
            if not future.done():
                future.set_exception(error)
                future.exception()  # retrieved: perhaps nobody waits
        for inlet in self.inlets.values():
            inlet.fail(error)
        self.outlet.fail(error)


class Control:
    """The control port of one sandbox. `on_lost` is called once when the guest is gone or broke the protocol."""

    def __init__(self, port: FramePort) -> None:
        self.port = port
        self.on_lost: Callable[[Exception], None] = lambda error: None
        self.hello: asyncio.Future[messages.Hello] = asyncio.get_running_loop().create_future()
        self.calls_made: int = 0  # probes not counted
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, Call] = {}
        self._next_stream = 1
        self._highest_stream = 0
        self._lost: Exception | None = None
        self._awake = asyncio.Event()
        self._awake.set()
        port.on_frame = self._take
        port.on_lost = self._end

    @classmethod
    async def open(cls, sock: socket.socket) -> Control:
        """Take over the host's end of the control port."""
        return cls(await FramePort.open(sock, PORT_CONTROL, max_payload=MAX_MAP))

    def open_call(
        self,
        request: messages.Request,
        operation: str,
        channels: tuple[int, ...] = (),
        *,
        urgent: bool = False,
        passive: bool = False,
    ) -> Call:
        """Send `request`; `operation` names it in errors, `channels` are those the guest will send on.

        Raises SandboxLostError when the sandbox is gone, UsageError for more than a request can hold.
        """
        self.require_loop(operation)
        self.require_open(operation)
        assert len(self._calls) < MAX_STREAMS, "calls leak"
        payload = check_fits(operation, messages.encode(request))
        call = Call(self, self._next_stream, operation, urgent=urgent, passive=passive)
        for channel in channels:
            call.inlet(channel)
        self.port.send(FrameType.OPEN, 0, call.stream, payload, urgent=urgent)
        self.calls_made += 1
        self._next_stream = self._next_stream + 1 if self._next_stream < GUEST_STREAM_BIT - 1 else 1
        self._highest_stream = max(self._highest_stream, call.stream)
        self._calls[call.stream] = call
        return call

    def require_open(self, operation: str) -> None:
        """Raise SandboxLostError when the guest is gone, or was closed."""
        if self._lost is not None:
            raise SandboxLostError(operation, str(self._lost))

    def require_loop(self, operation: str) -> None:
        """Raise SandboxStateError in another event loop than its own: nothing would ever come there."""
        if asyncio.get_running_loop() is not self._loop:
            raise SandboxStateError(
                operation,
                "the sandbox was created in another event loop",
                "Use it within one asyncio.run, or use taskvm.sync",
            )

    async def request(
        self,
        request: messages.Request,
        kind: type[_A],
        operation: str,
        timeout_s: float | None = None,
        *,
        urgent: bool = False,
    ) -> _A:
        """Send `request` and return its one answer. Raises as Call.answer."""
        call = self.open_call(request, operation, urgent=urgent)
        try:
            return await call.answer(kind, timeout_s)
        finally:
            self.drop(call.stream)

    async def probe(self, operation: str, timeout_s: float | None = None) -> None:
        """Make sure that the guest answers at all: within PROBE_TIMEOUT_S if nothing else is said, or it is lost.

        The time begins when the machine is awake. Raises SandboxLostError when it does not; the port is closed then,
        and every call fails with that error.
        """
        await self.wait_awake()
        timeout_s = PROBE_TIMEOUT_S if timeout_s is None else timeout_s
        # Urgent: an agent at rest answers, and a ping in a port that is held would never leave.
        call = self.open_call(messages.PingRequest(), operation, urgent=True)
        self.calls_made -= 1
        try:
            await asyncio.wait([call.reply], timeout=timeout_s)  # as in Call.answer
            if call.reply.done():
                await call.answer(messages.Done)
                return
        finally:
            self.drop(call.stream)
        error = SandboxLostError(
            operation,
            f"the guest did not answer within {timeout_s:g} s",
            "Start another sandbox",
        )
        self.port.lose(error)
        raise error

    async def wait_awake(self) -> None:
        """Wait while somebody is in `asleep`. Returns at once when the guest is lost."""
        await self._awake.wait()

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Let probes wait until the end: the machine stands still by its owner's will and cannot answer."""
        self._awake.clear()
        try:
            yield
        finally:
            self._awake.set()

    @property
    def open_calls(self) -> int:
        """How many calls have not ended, passive ones not counted."""
        return sum(not call.passive for call in self._calls.values())

    @property
    def running_execs(self) -> int:
        """How many commands run: the calls with a standard error."""
        return sum(2 in call.inlets for call in self._calls.values())

    def is_running(self, stream: int) -> bool:
        """Say whether the stream is that of a command that runs."""
        call = self._calls.get(stream)
        return call is not None and 2 in call.inlets

    def drop(self, stream: int) -> bool:
        """Forget a stream; frames that still come for it are ignored. Returns whether it was known."""
        return self._calls.pop(stream, None) is not None

    # Saved guests.

    def export(self) -> ControlState:
        """Return the state of a port at rest."""
        running = [call for call in self._calls.values() if 2 in call.inlets and call.reply.done()]
        others = set(self._calls) - {call.stream for call in running}
        others |= {each.stream for each in self.port.held_frames() if each.type is FrameType.RESET}
        return ControlState(
            next_stream=self._next_stream,
            highest_stream=self._highest_stream,
            commands=[
                CommandState(
                    stream=call.stream,
                    credits={
                        channel: inlet.credit
                        for channel, inlet in call.inlets.items()
                        if not inlet.ended
                    },
                )
                for call in running
            ],
            others=sorted(others),
        )

    def adopt(self, state: ControlState) -> None:
        """Go on where a saved guest's port was left: its commands run on, and what they write is dropped."""
        self._next_stream = state.next_stream
        self._highest_stream = state.highest_stream
        for command in state.commands:
            call = Call(self, command.stream, "run on in a saved guest")
            call.reply.set_result(b"")
            self._calls[call.stream] = call
            for channel, credit in command.credits.items():
                call.inlet(channel).drain(credit)
        for stream in state.others:
            self.port.send(FrameType.RESET, 0, stream, encode_u32(_CANCELED))

    # Ending.

    def close(self, error: Exception) -> None:
        """Close the port and fail every call with `error`. Idempotent."""
        self._fail_calls(error)
        self.port.close()

    # Frames from the guest.

    def _take(self, frame: Frame) -> None:
        if frame.type is FrameType.HELLO:
            self._greet(frame)
            return
        call = self._calls.get(frame.stream)
        if call is None:
            # A stream that we ended a moment ago; one that we never opened is a lie.
            if not 0 < frame.stream <= self._highest_stream:
                self.port.fail(f"{frame.type.name} on stream {frame.stream}, which is not ours")
            return
        handler = _HANDLERS.get(frame.type)
        if handler is None:
            self.port.fail(f"{frame.type.name} does not belong on this port")
            return
        handler(self, call, frame)

    def _greet(self, frame: Frame) -> None:
        try:
            hello = messages.decode(frame.payload, messages.Hello)
        except messages.AnswerError as error:
            self.port.fail(str(error))
            return
        if isinstance(hello, messages.Failure) or self.hello.done():
            self.port.fail("HELLO twice, or not one")
        elif hello.protocol != PROTOCOL_VERSION:
            self.port.fail(f"the agent speaks protocol {hello.protocol}, not {PROTOCOL_VERSION}")
        else:
            self.hello.set_result(hello)

    def _reply(self, call: Call, frame: Frame) -> None:
        if call.reply.done():
            self.port.fail(f"two replies on stream {call.stream}")
        else:
            call.reply.set_result(bytes(frame.payload))

    def _data(self, call: Call, frame: Frame) -> None:
        inlet = call.inlets.get(frame.channel)
        if inlet is None:
            self.port.fail(f"DATA on channel {frame.channel} of stream {call.stream}")
        else:
            inlet.feed(frame.payload)

    def _finish(self, call: Call, frame: Frame) -> None:
        inlet = call.inlets.get(frame.channel)
        if inlet is None:
            self.port.fail(f"END on channel {frame.channel} of stream {call.stream}")
        else:
            inlet.feed_end()

    def _credit(self, call: Call, frame: Frame) -> None:
        call.outlet.feed_credit(decode_u32(frame.payload))

    def _reset(self, call: Call, frame: Frame) -> None:
        reason = decode_u32(frame.payload)
        if reason > messages.MAX_ERRNO:
            self.port.fail(f"RESET of stream {call.stream} with the errno {reason}")
            return
        self.drop(call.stream)
        call.fail(StreamReset(reason))

    def _exit(self, call: Call, frame: Frame) -> None:
        try:
            exited = messages.decode(frame.payload, messages.Exited)
        except messages.AnswerError as error:
            self.port.fail(str(error))
            return
        if isinstance(exited, messages.Failure) or not call.reply.done():
            self.port.fail(f"EXIT before REPLY, or not one, on stream {call.stream}")
            return
        self.drop(call.stream)
        for inlet in call.inlets.values():
            inlet.feed_end()
        call.outlet.fail(BrokenPipeError(32, "the process has ended"))
        call.exited.set_result(exited)

    def _end(self, error: Exception) -> None:
        self._fail_calls(error)
        self.on_lost(error)

    def _fail_calls(self, error: Exception) -> None:
        self._lost = self._lost or error
        self._awake.set()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.fail(error)
        if not self.hello.done():
            self.hello.set_exception(error)
            self.hello.exception()


_HANDLERS: dict[FrameType, Callable[[Control, Call, Frame], None]] = {
    FrameType.REPLY: Control._reply,
    FrameType.DATA: Control._data,
    FrameType.END: Control._finish,
    FrameType.CREDIT: Control._credit,
    FrameType.RESET: Control._reset,
    FrameType.EXIT: Control._exit,
}
