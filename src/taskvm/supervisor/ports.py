"""The two ends of a connection between a client and the supervisor: frames as on a guest's ports, other errors.

A connection carries one call, on stream CALL. `Caller` is the client's end, `Service` the supervisor's.

Rule 1: a client that breaks the protocol, or is gone, ends its own call and nothing else.
Rule 2: what a client does not read stops only what is written to it: credit, per channel.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from taskvm.errors import HostError, SandboxLostError
from taskvm.port import FramePort, Inlet, Outlet, check_fits
from taskvm.wire import supervision as messages
from taskvm.wire.frames import MAX_MAP, Frame, FrameType, decode_u32

CALL = 1
# Keys come by DATA; commands are window sizes and signals. More in one turn of the loop is no person's doing.
MAX_COMMANDS = 64
# What a client that does not read its answer may cost.
LINGER_S = 5.0
OUTPUTS = (1, 2)

_T = TypeVar("_T")


class ClientGoneError(ConnectionError):
    """Raised when a client is written to that has left."""


class _ServicePort(FramePort):
    def make_protocol_error(self, reason: str) -> Exception:
        return ClientGoneError(f"the client broke the protocol: {reason}")

    def make_lost_error(self, attempt: str, reason: str) -> Exception:
        return ClientGoneError(f"{attempt} the client: it has left")


class _CallerPort(FramePort):
    def make_protocol_error(self, reason: str) -> Exception:
        return HostError(
            "read from the supervisor", reason, "Run `taskvm supervisor stop` and try again"
        )

    def make_lost_error(self, attempt: str, reason: str) -> Exception:
        return SandboxLostError(
            f"{attempt} the supervisor of your sandboxes",
            "it has ended, and they with it",
            "`taskvm ps` starts another one",
        )


class Service:
    """The supervisor's end. Set `on_gone` before the first await after `open`; it is called once."""

    def __init__(self, port: FramePort) -> None:
        loop = asyncio.get_running_loop()
        self.port = port
        self.on_gone: Callable[[], None] = lambda: None
        self.gone: bool = False
        self.request: asyncio.Future[bytes] = loop.create_future()
        self.input: Inlet = Inlet(port, CALL, 0)
        self.outputs: dict[int, Outlet] = {
            channel: Outlet(port, CALL, channel) for channel in OUTPUTS
        }
        self._commands: deque[messages.AnyCommand] = deque()
        self._commanded = asyncio.Event()
        port.on_frame = self._take
        port.on_lost = self._end

    @classmethod
    async def open(cls, sock: socket.socket) -> Service:
        """Take over a client's connection."""
        return cls(await _ServicePort.open(sock, "client", max_payload=MAX_MAP))

    def greet(self, greeting: messages.Greeting) -> None:
        self.port.send(FrameType.HELLO, 0, 0, messages.encode(greeting))

    def answer(self, answer: messages.Answer) -> None:
        self.port.send(FrameType.REPLY, 0, CALL, messages.encode(answer))

    def notify(self, notice: messages.Notice) -> None:
        """Tell something on the way; a client that has left misses it."""
        if not self.gone:
            self.port.send(FrameType.SIGNAL, 0, CALL, messages.encode(notice))

    def finish(self, ended: messages.Ended) -> None:
        self.port.send(FrameType.EXIT, 0, CALL, messages.encode(ended))

    async def next_command(self) -> messages.AnyCommand:
        """Wait for what the client says about its command."""
        while not self._commands:
            self._commanded.clear()
            await self._commanded.wait()
        return self._commands.popleft()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self.gone = True
        self.port.close(linger_s=LINGER_S)

    def _take(self, frame: Frame) -> None:
        if frame.type is FrameType.OPEN and not self.request.done():
            self.request.set_result(bytes(frame.payload))
        elif frame.stream != CALL or not self.request.done():
            self.port.fail(f"{frame.type.name} on stream {frame.stream} does not belong here")
        elif frame.type is FrameType.DATA and frame.channel == 0:
            self.input.feed(frame.payload)
        elif frame.type is FrameType.END and frame.channel == 0:
            self.input.feed_end()
        elif frame.type is FrameType.CREDIT and frame.channel in self.outputs:
            self.outputs[frame.channel].feed_credit(decode_u32(frame.payload))
        elif frame.type is FrameType.SIGNAL and len(self._commands) < MAX_COMMANDS:
            self._take_command(frame)
        else:
            self.port.fail(f"{frame.type.name} on channel {frame.channel} does not belong here")

    def _take_command(self, frame: Frame) -> None:
        try:
            self._commands.append(messages.decode_command(frame.payload))
        except messages.MessageError as error:
            self.port.fail(str(error))
        self._commanded.set()

    def _end(self, error: Exception) -> None:
        self.gone = True
        self.input.fail(error)
        for outlet in self.outputs.values():
            outlet.fail(error)
        if not self.request.done():
            self.request.set_exception(error)
            self.request.exception()
        self.on_gone()


class Caller:
    """The client's end. `on_notice` is called with what the supervisor tells on the way."""

    def __init__(self, port: FramePort) -> None:
        loop = asyncio.get_running_loop()
        self.port = port
        self.on_notice: Callable[[messages.Notice], None] = lambda notice: None
        self.greeting: asyncio.Future[messages.Greeting] = loop.create_future()
        self.ended: asyncio.Future[messages.Ended] = loop.create_future()
        self.input: Outlet = Outlet(port, CALL, 0)
        self.outputs: dict[int, Inlet] = {
            channel: Inlet(port, CALL, channel) for channel in OUTPUTS
        }
        self._answer: asyncio.Future[messages.Answer] = loop.create_future()
        port.on_frame = self._take
        port.on_lost = self._end

    @classmethod
    async def open(cls, sock: socket.socket) -> Caller:
        """Take over a connection to the supervisor."""
        return cls(await _CallerPort.open(sock, "supervisor", max_payload=MAX_MAP))

    async def ask(self, request: messages.Request, kind: type[_T]) -> _T:
        """Send the connection's one request and return its result. Raises what the supervisor raised."""
        payload = check_fits(f"{request.op} in the supervisor", messages.encode(request))
        self.port.send(FrameType.OPEN, 0, CALL, payload)
        answer = await asyncio.shield(self._answer)
        if answer.error is not None:
            raise answer.error.to_error()
        try:
            return messages.decode(bytes(answer.result), kind)
        except messages.MessageError as error:
            raise self.port.make_protocol_error(str(error)) from error

    async def wait_ended(self) -> messages.Ended:
        """Wait for the end of the command that this call is attached to. Raises SandboxLostError."""
        return await asyncio.shield(self.ended)

    def command(self, command: messages.Command) -> None:
        """Say something about the command that this call is attached to."""
        self.port.send(FrameType.SIGNAL, 0, CALL, messages.encode(command))

    def close(self) -> None:
        """Leave. What the supervisor does for nobody else ends; a command that runs goes on. Idempotent."""
        self.port.close()
        self._end(SandboxLostError("read from the supervisor", "the connection was closed"))

    def _take(self, frame: Frame) -> None:
        try:
            self._dispatch(frame)
        except messages.MessageError as error:
            self.port.fail(str(error))

    def _dispatch(self, frame: Frame) -> None:
        if frame.type is FrameType.HELLO and not self.greeting.done():
            self.greeting.set_result(messages.decode(frame.payload, messages.Greeting))
        elif frame.type is FrameType.REPLY and not self._answer.done():
            self._answer.set_result(messages.decode(frame.payload, messages.Answer))
        elif frame.type is FrameType.DATA and frame.channel in self.outputs:
            self.outputs[frame.channel].feed(frame.payload)
        elif frame.type is FrameType.END and frame.channel in self.outputs:
            self.outputs[frame.channel].feed_end()
        elif frame.type is FrameType.CREDIT and frame.channel == 0:
            self.input.feed_credit(decode_u32(frame.payload))
        elif frame.type is FrameType.SIGNAL:
            self.on_notice(messages.decode(frame.payload, messages.Notice))
        elif frame.type is FrameType.EXIT and not self.ended.done():
            self._finish(messages.decode(frame.payload, messages.Ended))
        else:
            self.port.fail(f"{frame.type.name} on channel {frame.channel} does not belong here")

    def _finish(self, ended: messages.Ended) -> None:
        for inlet in self.outputs.values():
            inlet.feed_end()
        self.input.fail(BrokenPipeError(32, "the process has ended"))
        self.ended.set_result(ended)

    def _end(self, error: Exception) -> None:
        for inlet in self.outputs.values():
            inlet.fail(error)
        self.input.fail(error)
        for future in (self.greeting, self.ended, self._answer):
            if not future.done():
                future.set_exception(error)
                future.exception()  # retrieved: perhaps nobody waits
