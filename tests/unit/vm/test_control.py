"""The control port: messages as closed schemas, calls matched to frames, and a guest that lies."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.errors import GuestError, GuestProtocolError, SandboxLostError, SandboxStateError
from taskvm.vm import control as control_module
from taskvm.vm.control import Call, Control
from taskvm.wire import control as messages
from taskvm.wire.frames import (
    INITIAL_CREDIT,
    MAX_DATA,
    Frame,
    FrameDecoder,
    FrameType,
    decode_u32,
    encode_frame,
    encode_u32,
)


class Guest:
    """The other end of a control port, played by the test."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []

    async def receive(self) -> Frame:
        while not self._frames:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
            assert data, "the host closed the port"
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    async def send(
        self, kind: FrameType, stream: int, payload: object = b"", channel: int = 0
    ) -> None:
        body = payload if isinstance(payload, bytes) else msgspec.msgpack.encode(payload)
        await self.send_bytes(encode_frame(kind, channel, stream, body))

    async def send_bytes(self, data: bytes) -> None:
        """What need not be a whole frame."""
        await asyncio.get_running_loop().sock_sendall(self._sock, data)


@contextlib.asynccontextmanager
async def control_and_guest() -> AsyncIterator[tuple[Control, Guest]]:
    ours, theirs = socket.socketpair()
    control = await Control.open(ours)
    try:
        with theirs:
            yield control, Guest(theirs)
    finally:
        control.close(SandboxLostError("test", "over"))
        await asyncio.sleep(0)


async def test_a_request_is_answered_on_its_stream() -> None:
    """The OPEN carries the operation; the REPLY on the same stream ends the wait."""
    async with control_and_guest() as (control, guest), asyncio.TaskGroup() as group:
        asking = group.create_task(
            control.request(messages.StatRequest(path=b"/x"), messages.FileStat, "stat /x")
        )
        opened = await guest.receive()
        asked = msgspec.msgpack.decode(opened.payload)
        answer = {"type": "file", "mode": 0o644, "size": 3, "uid": 0, "gid": 0}
        await guest.send(
            FrameType.REPLY, opened.stream, {**answer, "nlink": 1, "ino": 5, "mtime_ns": 1}
        )
        status = await asking

    assert asked == {"op": "stat", "path": b"/x", "follow": True}
    assert (status.type, status.size) == ("file", 3)


def test_another_event_loop_is_told() -> None:
    """As of a second asyncio.run: an answer would never come there."""
    ours, theirs = socket.socketpair()

    async def use(control: Control) -> None:
        await control.request(messages.PingRequest(), messages.Done, "ask the guest")

    with theirs, asyncio.Runner() as first, asyncio.Runner() as second:
        control = first.run(Control.open(ours))
        with pytest.raises(SandboxStateError, match="ask the guest: .* another event loop"):
            second.run(use(control))
        first.run(_close(control))


async def _close(control: Control) -> None:
    control.close(SandboxLostError("test", "over"))
    await asyncio.sleep(0)


async def test_a_refusal_becomes_a_guest_error_with_the_errno() -> None:
    """A reply with an errno raises GuestError that names operation, cause and call."""
    async with control_and_guest() as (control, guest), asyncio.TaskGroup() as group:
        asking = group.create_task(_outcome(control, messages.ListRequest(path=b"/none")))
        opened = await guest.receive()
        await guest.send(FrameType.REPLY, opened.stream, {"errno": 2, "call": "openat"})
        error = await asking

    assert isinstance(error, GuestError)
    assert error.errno == 2
    assert "No such file" in str(error)
    assert "openat" in str(error)


@pytest.mark.parametrize(
    ("kind", "payload", "channel"),
    [
        (FrameType.REPLY, {"surprise": 1}, 0),
        (FrameType.DATA, b"nobody asked", 7),
        (FrameType.FUSE, b"x" * 40, 0),
        (FrameType.EXIT, {"code": "zero"}, 0),
        (FrameType.HELLO, {"version": "1"}, 0),
        (FrameType.QUIESCED, b"", 0),
        (FrameType.CREDIT, encode_u32(2**32 - 1), 0),
    ],
)
async def test_a_guest_that_breaks_the_protocol_loses_the_port(
    kind: FrameType, payload: object, channel: int
) -> None:
    """A lie ends the port with GuestProtocolError, and every call that waits on it."""
    async with control_and_guest() as (control, guest), asyncio.TaskGroup() as group:
        lost: list[Exception] = []
        control.on_lost = lost.append
        asking = group.create_task(_outcome(control, messages.PingRequest()))
        opened = await guest.receive()
        await guest.send(kind, opened.stream, payload, channel)
        error = await asking

    assert isinstance(error, GuestProtocolError | SandboxLostError)
    assert [type(item) for item in lost] == [GuestProtocolError]


async def test_frames_for_a_stream_that_the_host_dropped_are_ignored() -> None:
    """What was under way when a call ended does no harm; a stream that the guest numbers itself does."""
    async with control_and_guest() as (control, guest):
        lost: list[Exception] = []
        control.on_lost = lost.append
        call = control.open_call(messages.PingRequest(), "ping")
        await guest.receive()
        call.forget()
        await guest.send(FrameType.REPLY, call.stream, {})
        await asyncio.sleep(0.05)
        still_fine = not lost
        await guest.send(FrameType.REPLY, 0x8000_0001, {})
        await asyncio.sleep(0.05)

    assert still_fine
    assert [type(item) for item in lost] == [GuestProtocolError]


async def test_only_a_command_that_has_not_ended_is_running() -> None:
    """Neither another call, nor one that was dropped, nor a number that was never a stream."""
    async with control_and_guest() as (control, _):
        ping = control.open_call(messages.PingRequest(), "ping")
        request = messages.ExecRequest(argv=[b"true"], env=[], cwd=b"/")
        command, ended = (control.open_call(request, "run true", (1, 2)) for _ in range(2))
        control.drop(ended.stream)

        running = [n for n in (-1, 0, *range(1, 9), 2**64) if control.is_running(n)]

    assert running == [command.stream]
    assert ping.stream != command.stream


async def test_the_end_of_the_guest_fails_every_waiting_call() -> None:
    """Nobody waits for a guest that is gone."""
    async with control_and_guest() as (control, guest), asyncio.TaskGroup() as group:
        asking = group.create_task(_outcome(control, messages.PingRequest()))
        await guest.receive()
        guest._sock.close()
        error = await asking

    assert isinstance(error, SandboxLostError)


async def _outcome(control: Control, request: messages.Request) -> Exception | None:
    try:
        await control.request(request, messages.Done, "test")
    except Exception as error:  # noqa: BLE001 - the test judges it
        return error
    return None


@given(st.binary(max_size=200))
def test_random_answers_raise_nothing_but_answer_error(noise: bytes) -> None:
    """Bytes from the guest become a typed answer or AnswerError."""
    for kind in (messages.FileStat, messages.Done, messages.Exited, messages.Hello):
        with contextlib.suppress(messages.AnswerError):
            assert isinstance(messages.decode(noise, kind), kind | messages.Failure)


async def test_an_operation_that_does_not_end_is_an_error_when_the_agent_is_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The agent answers the ping, not the request: the request is reset, and the sandbox goes on."""
    usual = control_module.REPLY_TIMEOUT_S
    monkeypatch.setattr(control_module, "REPLY_TIMEOUT_S", 0.05)
    async with control_and_guest() as (control, guest), asyncio.TaskGroup() as group:
        asking = group.create_task(_outcome(control, messages.ReadlinkRequest(path=b"/slow")))
        opened = await guest.receive()
        reset = await guest.receive()
        ping = await guest.receive()
        await guest.send(FrameType.REPLY, ping.stream, {})
        error = await asking
        monkeypatch.setattr(control_module, "REPLY_TIMEOUT_S", usual)
        again = group.create_task(_outcome(control, messages.PingRequest()))
        await guest.send(FrameType.REPLY, (await guest.receive()).stream, {})

    assert (reset.type, reset.stream) == (FrameType.RESET, opened.stream)
    assert isinstance(error, GuestError)
    assert error.errno == errno.ETIMEDOUT
    assert await again is None


async def test_an_answer_that_came_while_this_program_stood_still_is_none_that_is_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after Ctrl-Z: of its time more than all is over when the loop looks again, and it lies there."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    async with control_and_guest() as (control, guest), asyncio.TaskGroup() as group:
        asking = group.create_task(_outcome(control, messages.PingRequest()))
        opened = await guest.receive()

        await guest.send(FrameType.REPLY, opened.stream, {})
        monkeypatch.setattr(loop, "time", lambda: clock() + 1e4)

        assert await asking is None


async def test_a_guest_that_does_not_answer_a_ping_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call fails with the reason, and so does each that comes later."""
    monkeypatch.setattr(control_module, "PROBE_TIMEOUT_S", 0.05)
    lost: list[Exception] = []
    async with control_and_guest() as (control, _guest), asyncio.TaskGroup() as group:
        control.on_lost = lost.append
        waiting = group.create_task(_outcome(control, messages.SyncRequest()))
        with pytest.raises(SandboxLostError, match=r"did not answer within 0\.05 s"):
            await control.probe("look after the guest")
        error = await waiting
        later = await _outcome(control, messages.SyncRequest())

    assert lost == [error]
    assert isinstance(later, SandboxLostError)


async def test_a_ping_that_nobody_waits_for_any_more_is_no_activity() -> None:
    """A sandbox whose probe was cancelled would never be idle again."""
    async with control_and_guest() as (control, guest):
        probing = asyncio.get_running_loop().create_task(control.probe("end a late command"))
        await guest.receive()
        probing.cancel()
        await asyncio.wait([probing])

        assert control.open_calls == 0


async def _run_command(control: Control, guest: Guest) -> Call:
    request = messages.ExecRequest(argv=[b"cat"], env=[], cwd=b"/")
    call = control.open_call(request, "run cat", (1, 2))
    await guest.receive()
    await guest.send(FrameType.REPLY, call.stream, {"pid": 7})
    await call.answer(messages.Started)
    return call


async def test_a_saved_command_goes_on_though_credit_for_it_was_held_when_it_was_saved() -> None:
    """The guest had spent its window, and was granted another while its port was at rest: it does not know."""
    async with control_and_guest() as (control, guest):
        call = await _run_command(control, guest)
        control.port.hold()
        for _ in range(INITIAL_CREDIT // MAX_DATA):
            await guest.send(FrameType.DATA, call.stream, b"x" * MAX_DATA, 1)
            await call.inlets[1].read(MAX_DATA)
        state = control.export()
    async with control_and_guest() as (copy, guest):
        copy.adopt(state)
        copy.open_call(messages.PingRequest(), "ask something else")

        first = await guest.receive()

    assert (first.type, first.stream, first.channel) == (FrameType.CREDIT, call.stream, 1)
    assert decode_u32(first.payload) >= INITIAL_CREDIT


async def test_a_command_that_was_given_up_while_its_guest_was_saved_ends_in_the_copy() -> None:
    """The saved guest never heard of the RESET, which was held: the copy's is told again."""
    async with control_and_guest() as (control, guest):
        call = await _run_command(control, guest)
        control.port.hold()
        call.forget(errno=errno.ECANCELED)
        state = control.export()
    async with control_and_guest() as (copy, guest):
        copy.adopt(state)
        copy.open_call(messages.PingRequest(), "ask something else")

        reset = await guest.receive()

    assert (reset.type, reset.stream) == (FrameType.RESET, call.stream)
