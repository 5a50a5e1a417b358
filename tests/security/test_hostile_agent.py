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
from tests.support.waiting import PATIENCE_S
from tests.unit.vm.test_control import control_and_guest

from taskvm import GuestError, GuestProtocolError, SandboxLostError, TaskvmError, UsageError
from taskvm import files as files_module
from taskvm.files import Files
from taskvm.process import Capture, Process
from taskvm.vm.control import Control
from taskvm.wire.control import ExecRequest, Started
from taskvm.wire.frames import FrameType, encode_u32

Frames = list[tuple[FrameType, object, int]]
REPLY, DATA, END, RESET, EXIT = (
    FrameType.REPLY,
    FrameType.DATA,
    FrameType.END,
    FrameType.RESET,
    FrameType.EXIT,
)
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


async def outcome(
    ask: Callable[[Control], Awaitable[object]], frames: Frames
) -> tuple[object, list[Exception]]:
    """Answer what `ask` opens with `frames`. Return its result or error, and what the port ended with."""
    lost: list[Exception] = []
    async with control_and_guest() as (control, guest), asyncio.timeout(PATIENCE_S):

        async def asked() -> object:
            try:
                return await ask(control)
            except BaseExceptionGroup as group:  # Sandbox.exec unpacks it in the same way
                return group.exceptions[0]
            except Exception as error:  # noqa: BLE001 - the test judges it
                return error

        control.on_lost = lost.append
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(asked())
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


async def test_a_stream_that_was_never_opened_is_a_lie() -> None:
    """Late frames are dropped; a frame of a number that the host has not used yet cannot be late."""
    lost: list[Exception] = []
    async with control_and_guest() as (control, guest):
        control.on_lost = lost.append
        await guest.send(DATA, 5, b"x", 1)
        await asyncio.sleep(0.05)

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
