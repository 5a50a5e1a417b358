"""A guest's root has replaced the agent: it answers what it likes, and the host believes none of it.

The other end of a socket pair plays the agent. The host must end that sandbox, or tell an error of its own tree that
holds nothing a terminal would act on; it may not crash, hang, or pass on a name that leads out of a directory.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from tests.support.peak import printed_by
from tests.support.waiting import PATIENCE_S, until
from tests.unit.vm.test_control import control_and_guest

from taskvm import GuestError, GuestProtocolError, SandboxLostError, TaskvmError, UsageError
from taskvm import files as files_module
from taskvm.files import Files
from taskvm.process import Capture, Process
from taskvm.vm import control as control_module
from taskvm.vm.control import Control
from taskvm.wire.control import ExecRequest, Started
from taskvm.wire.frames import (
    MAX_DATA,
    MAX_MAP,
    PROTOCOL_VERSION,
    FrameType,
    encode_frame,
    encode_u32,
)

FrameAndChannel = tuple[FrameType, object, int]
Frames = list[FrameAndChannel]
REPLY, DATA, END, RESET, EXIT = (
    FrameType.REPLY,
    FrameType.DATA,
    FrameType.END,
    FrameType.RESET,
    FrameType.EXIT,
)
HELLO = {"version": "1", "protocol": PROTOCOL_VERSION, "arch": "x86_64", "kernel": "6.1"}
ENDED = (EXIT, {"code": 0}, 0)
STATUS = {"type": "file", "mode": 0o644, "size": 1, "uid": 0, "gid": 0}
STATUS |= {"nlink": 1, "ino": 1, "mtime_ns": 1}
COUNTERS = ("user_us", "system_us", "memory_peak", "processes_peak", "read_bytes", "written_bytes")
BILL = dict.fromkeys((*COUNTERS, "oom_kills"), 1)
OPENED = (REPLY, {"size": 1, "mode": 0o644, "mtime_ns": 1}, 0)
STARTED = (REPLY, {"pid": 7}, 0)
ESCAPES = "\x1b]0;owned\x07\x1b[2J"


async def stat(control: Control) -> object:
    return await Files(control, 0, 0).stat("/x")


async def read_three(control: Control) -> object:
    return await Files(control, 0, 0).read_bytes("/x", length=3)


async def list_names(control: Control) -> object:
    return [entry.name for entry in await Files(control, 0, 0).list("/x")]


async def watch(control: Control) -> object:
    return [change async for change in await Files(control, 0, 0).watch("/x")]


async def run(control: Control) -> object:
    request = ExecRequest(argv=[b"true"], env=[], cwd=b"/")
    call = control.open_call(request, "run true", (1, 2))
    started = await call.answer(Started)
    return await Capture().run(Process(call, "true", started.pid), None)


def entry(name: bytes, **changes: object) -> bytes:
    """One entry of a listing, as the agent sends it."""
    fields: dict[str, object] = {"name": name, "type": "file", "mode": 0o644, "size": 1}
    packed = msgspec.msgpack.encode({**fields, "mtime_ns": 1, **changes})
    return struct.pack("<I", len(packed)) + packed


def change(path: bytes, **changes: object) -> bytes:
    """One record of a watch, as the agent sends it."""
    packed = msgspec.msgpack.encode({"kind": "created", "path": path, "dir": 0, **changes})
    return struct.pack("<I", len(packed)) + packed


def listing(content: bytes) -> Frames:
    return [(REPLY, {}, 0), (DATA, content, 1), (END, b"", 1)]


async def settled(asking: Awaitable[object]) -> object:
    """Return what comes of it, a result or an error."""
    try:
        return await asking
    except BaseExceptionGroup as group:  # Sandbox.exec unpacks it in the same way
        return group.exceptions[0]
    except Exception as error:  # noqa: BLE001 - the test judges it
        return error


async def outcome(
    ask: Callable[[Control], Awaitable[object]], frames: Frames
) -> tuple[object, list[Exception]]:
    """Answer what `ask` opens with `frames`. Return its result or error, and what the port ended with."""
    lost: list[Exception] = []
    async with control_and_guest() as (control, guest), asyncio.timeout(PATIENCE_S):
        control.on_lost = lost.append
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(settled(ask(control)))
            opened = await guest.receive()
            for kind, payload, channel in frames:
                await guest.send(kind, opened.stream, payload, channel)
            return await asking, lost


LIES: dict[str, tuple[Callable[[Control], Awaitable[object]], Frames]] = {
    "an errno that is no C int": (stat, [(REPLY, {"errno": 2**31, "call": "x"}, 0)]),
    "an errno of zero": (stat, [(REPLY, {"errno": 0, "call": "x"}, 0)]),
    "escapes in the name of a call": (stat, [(REPLY, {"errno": 2, "call": ESCAPES}, 0)]),
    "a call with a long name": (stat, [(REPLY, {"errno": 2, "call": "x" * 100_000}, 0)]),
    "escapes in an unknown key": (stat, [(REPLY, {ESCAPES * 1000: 1}, 0)]),
    "escapes in a type": (stat, [(REPLY, {**STATUS, "type": ESCAPES}, 0)]),
    "a negative size": (stat, [(REPLY, {**STATUS, "size": -1}, 0)]),
    "more mode than twelve bits": (stat, [(REPLY, {**STATUS, "mode": 0o100644}, 0)]),
    "an owner that is no uid_t": (stat, [(REPLY, {**STATUS, "uid": 2**32}, 0)]),
    "a reset with no errno": (stat, [(RESET, encode_u32(2**32 - 1), 0)]),
    "an exit of what is no process": (stat, [(EXIT, {"code": 0}, 0)]),
    "more bytes than asked for": (read_three, [OPENED, (DATA, b"four", 1), (END, b"", 1)]),
    "a name that leads elsewhere": (list_names, listing(entry(b"../.bashrc"))),
    "an absolute name": (list_names, listing(entry(b"/etc/passwd"))),
    "the name of the parent": (list_names, listing(entry(b".."))),
    "an empty name": (list_names, listing(entry(b""))),
    "a name with a NUL": (list_names, listing(entry(b"a\0b"))),
    "escapes in the type of an entry": (list_names, listing(entry(b"a", type=ESCAPES))),
    "a process that is none": (run, [(REPLY, {"pid": -1}, 0)]),
    "an exit before the start": (run, [(EXIT, {"code": 0}, 0)]),
    "an exit without an ending": (run, [STARTED, (EXIT, {}, 0)]),
    "an exit with two endings": (run, [STARTED, (EXIT, {"code": 0, "signal": 9}, 0)]),
    "an exit code beyond a byte": (run, [STARTED, (EXIT, {"code": 2**63}, 0)]),
    "a bill below zero": (run, [STARTED, (EXIT, {"code": 0, "usage": {**BILL, "user_us": -1}}, 0)]),
    "a bill beyond all time": (
        run,
        [STARTED, (EXIT, {"code": 0, "usage": {**BILL, "user_us": 2**63}}, 0)],
    ),
    "a bill that lacks a part": (run, [STARTED, (EXIT, {"code": 0, "usage": {"user_us": 1}}, 0)]),
    "a change outside of what is watched": (watch, [(REPLY, {}, 0), (DATA, change(b"../up"), 1)]),
    "a change of no kind": (watch, [(REPLY, {}, 0), (DATA, change(b"a", kind=ESCAPES), 1)]),
    "a change without end": (watch, [(REPLY, {}, 0), (DATA, b"\xff\xff\xff\xff", 1)]),
    "a signal that is none": (run, [STARTED, (EXIT, {"signal": -77}, 0)]),
    "a second reply": (run, [STARTED, STARTED]),
    "a second greeting": (run, [(FrameType.HELLO, HELLO, 0)] * 2),
    "bytes after the end of an output": (run, [STARTED, (END, b"", 1), (DATA, b"more", 1)]),
    "output of a third kind": (run, [STARTED, (DATA, b"x", 3)]),
    "output before the start and too much of it": (run, [(DATA, bytes(MAX_DATA), 1)] * 5),
    "credit without end": (run, [STARTED, *[(FrameType.CREDIT, encode_u32(2**31 - 1), 0)] * 2]),
    "a request of its own": (run, [STARTED, (FrameType.OPEN, {"op": "exec"}, 0)]),
    "a signal for the host": (run, [STARTED, (FrameType.SIGNAL, {"signal": 9}, 0)]),
    "an order to go on": (run, [STARTED, (FrameType.RESUME, b"", 0)]),
    "a rest that nobody asked for": (run, [STARTED, (FrameType.QUIESCED, b"", 0)]),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_ends_the_sandbox_and_is_told_in_clean_words(lie: str) -> None:
    """The port ends with GuestProtocolError, the caller gets an error of the tree, and both are printable and short."""
    ask, frames = LIES[lie]

    result, lost = await outcome(ask, frames)

    assert isinstance(result, SandboxLostError | GuestProtocolError)
    assert [type(error) for error in lost] == [GuestProtocolError]
    for error in (result, *lost):
        assert str(error).isprintable()
        assert len(str(error)) < 2000


@pytest.mark.parametrize(
    "again",
    [ENDED, STARTED, (DATA, b"more", 1), (END, b"", 1), (RESET, encode_u32(5), 0)],
    ids=lambda frame: frame[0].name,
)
async def test_what_is_replayed_after_the_end_changes_nothing(again: FrameAndChannel) -> None:
    """It may have been under way: the result is the first one's, and a later command has its own."""
    frames = [STARTED, (DATA, b"first", 1), ENDED]
    async with control_and_guest() as (control, guest), asyncio.timeout(PATIENCE_S):
        lost: list[Exception] = []
        control.on_lost = lost.append
        results = []
        async with asyncio.TaskGroup() as group:
            first = group.create_task(run(control))
            old = (await guest.receive()).stream
            for kind, payload, channel in [*frames, again, again]:
                await guest.send(kind, old, payload, channel)
            results.append(await first)
            second = group.create_task(run(control))
            new = (await guest.receive()).stream
            await guest.send(again[0], old, again[1], again[2])
            for kind, payload, channel in [STARTED, (DATA, b"second", 1), ENDED]:
                await guest.send(kind, new, payload, channel)
            results.append(await second)

    assert [result.stdout for result in results] == ["first", "second"]
    assert new != old
    assert lost == []


async def test_half_a_frame_and_then_silence_is_a_lost_guest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest of a megabyte that was announced never comes: what asks after the guest ends everything that waits."""
    monkeypatch.setattr(control_module, "PROBE_TIMEOUT_S", 0.05)
    async with control_and_guest() as (control, guest), asyncio.timeout(PATIENCE_S):
        lost: list[Exception] = []
        control.on_lost = lost.append
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(settled(run(control)))
            opened = await guest.receive()
            frame = encode_frame(REPLY, 0, opened.stream, bytes(MAX_MAP))
            await guest.send_bytes(frame[: len(frame) // 2])
            asking = await settled(control.probe("look after the guest"))
            error = await waiting

    assert isinstance(asking, SandboxLostError)
    assert isinstance(error, SandboxLostError)
    assert [type(item) for item in lost] == [SandboxLostError]


# A program, so that nothing of the runner's hides its peak. A thread floods one port until its neighbour, another one,
# has answered 200 pings, and then answers too. It prints how many MiB came and how far memory rose.
FLOOD = """
import asyncio, socket, sys, threading
import msgspec
from tests.support.peak import Peak
from taskvm.vm.control import Control
from taskvm.wire import control as messages
from taskvm.wire.frames import FrameDecoder, FrameType, encode_frame

kind = FrameType[sys.argv[1]]
payload, least = (bytes(1 << 20), 32 << 20) if kind is FrameType.REPLY else (b"", 4 << 20)
frames = encode_frame(kind, 0, 1, payload) * max(1, (1 << 18) // (12 + len(payload)))
done, flooded = threading.Event(), [0]

def flood(sock):
    while not done.is_set() or flooded[0] < least:
        sock.sendall(frames)
        flooded[0] += len(frames)
    answer(sock)

def answer(sock):
    decoder = FrameDecoder()
    while data := sock.recv(65536):
        for frame in decoder.feed(data):
            sock.sendall(encode_frame(FrameType.REPLY, 0, frame.stream, msgspec.msgpack.encode({})))

async def ask(control):
    await control.request(messages.PingRequest(), messages.Done, "ping", timeout_s=100)

async def main():
    (ours, hostile), (ours_too, healthy) = socket.socketpair(), socket.socketpair()
    flooding, neighbour = await Control.open(ours), await Control.open(ours_too)
    call = flooding.open_call(messages.PingRequest(), "ping")
    call.forget()  # its stream may still get frames
    threading.Thread(target=answer, args=(healthy,), daemon=True).start()
    await ask(neighbour)
    peak = Peak()
    threading.Thread(target=flood, args=(hostile,), daemon=True).start()
    for _ in range(200):
        await ask(neighbour)
    done.set()
    await ask(flooding)
    print(flooded[0] >> 20, peak.growth_mib())

asyncio.run(main())
"""


@pytest.mark.parametrize(("kind", "least_mib"), [("REPLY", 32), ("END", 4)])
def test_a_flood_of_late_frames_is_not_kept_and_starves_no_neighbour(
    kind: str, least_mib: int
) -> None:
    """Frames for a stream that has ended cannot be told from a lie; there may be any number of them."""
    flooded_mib, growth_mib = printed_by(FLOOD, kind)

    assert int(flooded_mib) >= least_mib
    assert float(growth_mib) < 10


async def test_a_stream_that_was_never_opened_is_a_lie() -> None:
    """Late frames are dropped; a frame of a number that the host has not used yet cannot be late."""
    lost: list[Exception] = []
    async with control_and_guest() as (control, guest):
        control.on_lost = lost.append
        await guest.send(DATA, 5, b"x", 1)
        await until(lambda: lost)

    assert [type(error) for error in lost] == [GuestProtocolError]


async def test_a_running_process_that_is_reset_is_an_error_of_the_guest() -> None:
    """Nobody outside meets the engine's own StreamReset."""
    result, lost = await outcome(run, [STARTED, (RESET, encode_u32(5), 0)])

    assert isinstance(result, GuestError)
    assert lost == []


async def test_writing_to_a_process_that_is_reset_is_a_broken_pipe() -> None:
    """As the documentation of `Process.write` says."""

    async def write(control: Control) -> Any:
        call = control.open_call(ExecRequest(argv=[b"cat"], env=[], cwd=b"/"), "run cat", (1, 2))
        process = Process(call, "cat", (await call.answer(Started)).pid)
        while True:
            await process.write(b"x")
            await asyncio.sleep(0)

    result, _lost = await outcome(write, [STARTED, (RESET, encode_u32(5), 0)])

    assert isinstance(result, BrokenPipeError)


async def test_a_listing_without_end_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of a hostile guest is as long as it likes; what is made of it is not."""
    monkeypatch.setattr(files_module, "MAX_LISTING_BYTES", 60_000)
    names = entry(b"n" * 255) * 200

    result, _lost = await outcome(list_names, [(REPLY, {}, 0), (DATA, names[:65_000], 1)])

    assert isinstance(result, UsageError)
    assert isinstance(result, TaskvmError)
