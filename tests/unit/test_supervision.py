"""taskvm.wire.supervision and taskvm.supervisor.ports: what client and supervisor say, whole and broken."""

import asyncio
import inspect
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.waiting import PATIENCE_S

from taskvm import errors
from taskvm.errors import GuestError, GuestProtocolError, HostError, SandboxLostError, TaskvmError
from taskvm.supervisor.operations import OPERATIONS
from taskvm.supervisor.ports import MAX_COMMANDS, Caller, Service
from taskvm.wire import supervision
from taskvm.wire.frames import FrameType, encode_frame
from taskvm.wire.supervision import (
    Answer,
    ExecRequest,
    ExecStatus,
    Greeting,
    Launch,
    MessageError,
    Refusal,
    Request,
    StartRequest,
    decode,
    decode_command,
    encode,
    name_operation,
    raw,
)

REQUEST = ExecRequest(sandbox="work", launch=Launch(command=["ls", "-l"], pty=(24, 80)))


def test_every_request_has_an_operation() -> None:
    requests = {
        kind.__struct_config__.tag: kind
        for kind in vars(supervision).values()
        if inspect.isclass(kind) and issubclass(kind, Request) and kind is not Request
    }

    assert {name: kind for name, (kind, _) in OPERATIONS.items()} == requests


def test_a_request_survives_the_wire() -> None:
    payload = encode(REQUEST)

    assert name_operation(payload) == "exec"
    assert decode(payload, ExecRequest) == REQUEST


@given(st.integers(0, 60))
def test_a_request_that_is_cut_is_refused(size: int) -> None:
    payload = encode(REQUEST)

    with pytest.raises(MessageError):
        decode(payload[: min(size, len(payload) - 1)], ExecRequest)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_in_one_way(payload: bytes) -> None:
    for read in (name_operation, decode_command, lambda data: decode(data, StartRequest)):
        with pytest.raises(MessageError):
            read(payload)


def test_a_refusal_repeats_nothing_of_the_message() -> None:
    """A request holds the values of secrets."""
    request = {"op": "start", "options": {}, "variables": {"TOKEN": 5, "canary-31": "canary-31"}}

    with pytest.raises(MessageError) as caught:
        decode(encode(request), StartRequest)

    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        *(
            kind("do it", "it cannot be done", "Do another")
            for kind in vars(errors).values()
            if inspect.isclass(kind)
            and issubclass(kind, TaskvmError)
            and kind.__init__ is TaskvmError.__init__
        ),
        GuestError("read /x", 2, "open"),
        GuestProtocolError("net", "nonsense"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_in_the_client(error: TaskvmError) -> None:
    told = decode(encode(Refusal.of(error)), Refusal).to_error()

    assert (type(told), str(told)) == (type(error), str(error))


# Over a real socket.


async def _pair() -> tuple[Service, Caller]:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    return await Service.open(ours), await Caller.open(theirs)


async def test_a_call_is_greeted_asked_and_answered() -> None:
    service, caller = await _pair()
    status = ExecStatus(number=3, command="ls", pty=False, age_s=0.0, attached=1)

    service.greet(Greeting(version="1", pid=2))
    assert (await caller.greeting).version == "1"
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(caller.ask(REQUEST, ExecStatus))
        assert decode(await service.request, ExecRequest) == REQUEST
        service.answer(Answer(result=raw(status)))

    assert asking.result() == status
    service.close()
    caller.close()


async def test_an_error_is_raised_in_the_client() -> None:
    service, caller = await _pair()
    service.answer(Answer(error=Refusal.of(HostError("do it", "no"))))

    with pytest.raises(HostError, match="do it: no"):
        await caller.ask(REQUEST, ExecStatus)

    service.close()
    caller.close()


async def test_a_supervisor_that_dies_ends_the_call() -> None:
    service, caller = await _pair()
    service.port.close()

    with pytest.raises(SandboxLostError, match="it has ended"):
        await caller.ask(REQUEST, ExecStatus)

    caller.close()


COMMAND = encode(supervision.Resize(rows=1, cols=1))


@pytest.mark.parametrize(
    "frames",
    [
        b"\xff" * 64,
        encode_frame(FrameType.DATA, 0, 1, b"before the request"),
        encode_frame(FrameType.OPEN, 0, 1, b"\x80") * 2,
        encode_frame(FrameType.OPEN, 0, 1, b"\x80") + encode_frame(FrameType.DATA, 7, 1, b"x"),
        encode_frame(FrameType.OPEN, 0, 1, b"\x80") + encode_frame(FrameType.HELLO, 0, 0, b"\x80"),
        encode_frame(FrameType.OPEN, 0, 1, b"\x80") + encode_frame(FrameType.SIGNAL, 0, 1, b"no"),
        encode_frame(FrameType.OPEN, 0, 1, b"\x80")
        + encode_frame(FrameType.SIGNAL, 0, 1, COMMAND) * (MAX_COMMANDS + 1),
        encode_frame(FrameType.OPEN, 0, 1, b"\x80")
        + encode_frame(FrameType.DATA, 0, 1, bytes(65536)) * 5,
    ],
    ids=["noise", "early", "twice", "channel", "type", "command", "flood", "credit"],
)
async def test_a_client_that_breaks_the_protocol_is_dropped(frames: bytes) -> None:
    """Its call is gone; nothing else is touched."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    service = await Service.open(ours)
    gone = asyncio.Event()
    service.on_gone = gone.set
    theirs.settimeout(PATIENCE_S)

    await asyncio.to_thread(theirs.sendall, frames)
    async with asyncio.timeout(PATIENCE_S):
        await gone.wait()

    assert service.gone
    theirs.close()
