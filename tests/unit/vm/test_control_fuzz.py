"""Answers of a guest with broken bytes, cut anywhere and in any pieces (taskvm.wire.control, taskvm.vm.control)."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.vm.test_control import control_and_guest

from taskvm.errors import GuestProtocolError
from taskvm.vm.control import Call
from taskvm.wire import control as messages
from taskvm.wire.frames import PROTOCOL_VERSION, FrameType, encode_frame, encode_u32

COUNTERS = ("user_us", "system_us", "memory_peak", "processes_peak", "read_bytes", "written_bytes")
# One of each kind with every field, as the agent sends it.
VALID: list[messages._Answer] = [
    messages.Hello(version="1", protocol=PROTOCOL_VERSION, arch="x86_64", kernel="6.1"),
    messages.Failure(errno=2, call="openat"),
    messages.Done(),
    messages.Started(pid=7),
    messages.ReadStarted(size=2**40, mode=0o644, mtime_ns=-1),
    messages.Written(size=5),
    messages.FileStat(
        type="symlink",
        mode=0o777,
        size=3,
        uid=0,
        gid=2**32 - 1,
        nlink=1,
        ino=5,
        mtime_ns=1,
        target=b"\xff",
    ),
    messages.LinkTarget(target=b"../x"),
    messages.DirEntry(name=b"n\xff", type="dir", mode=0o755, size=0, mtime_ns=1, mark="opaque"),
    messages.Exited(
        signal=9, usage=messages.UsageReport(**dict.fromkeys((*COUNTERS, "oom_kills"), 2**62))
    ),
]
HELLO, STARTED, EXITED = (msgspec.msgpack.encode(VALID[at]) for at in (0, 3, 9))
# All that a guest says in a command's life, on the stream that is open.
CONVERSATION = b"".join(
    [
        encode_frame(FrameType.HELLO, 0, 0, HELLO),
        encode_frame(FrameType.REPLY, 0, 1, STARTED),
        encode_frame(FrameType.DATA, 1, 1, b"some output"),
        encode_frame(FrameType.CREDIT, 0, 1, encode_u32(4096)),
        encode_frame(FrameType.DATA, 2, 1, b"an error"),
        encode_frame(FrameType.END, 1, 1),
        encode_frame(FrameType.END, 2, 1),
        encode_frame(FrameType.EXIT, 0, 1, EXITED),
    ]
)
SPOILS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4)


def spoiled(data: bytes, spoils: list[tuple[int, int]]) -> bytes:
    """Put other bytes in some places."""
    broken = bytearray(data)
    for place, value in spoils:
        broken[place % len(broken)] = value
    return bytes(broken)


@pytest.mark.parametrize("answer", VALID, ids=lambda answer: type(answer).__name__)
@given(spoils=SPOILS, cut=st.integers(0, 2**16))
def test_a_valid_answer_with_broken_bytes_is_an_answer_or_an_answer_error(
    answer: messages._Answer, spoils: list[tuple[int, int]], cut: int
) -> None:
    """Whatever decodes has only values that the schema allows: it comes out the same when it is encoded again."""
    whole = msgspec.msgpack.encode(answer)
    for data in (spoiled(whole, spoils), whole[: cut % len(whole)]):
        for kind in (type(answer), messages.Failure, messages.Done):
            try:
                found = messages.decode(data, kind)
            except messages.AnswerError:
                continue
            assert messages.decode(msgspec.msgpack.encode(found), kind) == found


@dataclass
class Heard:
    """What came of the frames that a guest sent for a running command."""

    lost: list[Exception] = field(default_factory=list)
    hello: object = None
    reply: object = None
    output: tuple[bytes, bytes] = (b"", b"")
    exited: object = None


def settled(future: asyncio.Future[object]) -> object:
    """Return the result of a future, or the type of its error; None when there is neither."""
    if not future.done() or future.cancelled():
        return None
    error = future.exception()
    return future.result() if error is None else type(error)


def output_of(call: Call, channel: int) -> bytes:
    return b"".join(call.inlets[channel]._chunks)


async def hear(pieces: list[bytes]) -> Heard:
    """Give a port that runs one command these pieces as they would arrive, one after another."""
    heard = Heard()
    async with control_and_guest() as (control, _):
        control.on_lost = heard.lost.append
        request = messages.ExecRequest(argv=[b"true"], env=[], cwd=b"/")
        call = control.open_call(request, "run true", (1, 2))
        for piece in pieces:
            if not heard.lost:  # a port that has failed is read no more
                control.port.data_received(piece)
        heard.hello, heard.reply = settled(control.hello), settled(call.reply)
        heard.output = (output_of(call, 1), output_of(call, 2))
        heard.exited = settled(call.exited)
    return heard


WHOLE = Heard(hello=VALID[0], reply=STARTED, output=(b"some output", b"an error"), exited=VALID[9])


def test_the_conversation_is_heard_whole() -> None:
    assert asyncio.run(hear([CONVERSATION])) == WHOLE


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=20))
def test_pieces_of_any_size_say_the_same(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(CONVERSATION)]
    pieces = [CONVERSATION[a:b] for a, b in itertools.pairwise(places)]

    assert asyncio.run(hear(pieces)) == WHOLE


def test_every_byte_may_come_alone() -> None:
    assert asyncio.run(hear([bytes([each]) for each in CONVERSATION])) == WHOLE


@given(st.integers(0, len(CONVERSATION)))
def test_a_conversation_that_breaks_off_is_as_much_as_came(cut: int) -> None:
    """Neither an error nor anything that was not said: the rest may still be on its way."""
    heard = asyncio.run(hear([CONVERSATION[:cut]]))

    assert heard.lost == []
    for name in ("hello", "reply", "exited"):
        assert getattr(heard, name) in (None, getattr(WHOLE, name))
    for came, all_of_it in zip(heard.output, WHOLE.output, strict=True):
        assert all_of_it.startswith(came)


@given(spoils=SPOILS, cuts=st.lists(st.integers(0, len(CONVERSATION)), max_size=5))
def test_broken_bytes_end_the_port_once_or_not_at_all(
    spoils: list[tuple[int, int]], cuts: list[int]
) -> None:
    """No other exception than GuestProtocolError, told once, in printable words."""
    broken = spoiled(CONVERSATION, spoils)
    places = [0, *sorted(cuts), len(broken)]

    heard = asyncio.run(hear([broken[a:b] for a, b in itertools.pairwise(places)]))

    assert [type(error) for error in heard.lost] in ([], [GuestProtocolError])
    assert all(str(error).isprintable() for error in heard.lost)
