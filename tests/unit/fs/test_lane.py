"""taskvm.fs.lane: a provider that takes its time holds up its own mount and nothing else, for a bounded time."""

from __future__ import annotations

import errno
import logging
import math
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.port_end import INIT, Guest, port_end
from tests.support.waiting import PATIENCE_S, wait_until

from taskvm.errors import GuestProtocolError
from taskvm.fs import hostdir as hostdir_module
from taskvm.fs import lane as lane_module
from taskvm.fs import server as server_module
from taskvm.fs.hooks import Hooks, Operation
from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.pathprovider import PathProvider
from taskvm.fs.provider import Entry, Provider
from taskvm.fs.quota import Quota
from taskvm.fs.readonly import ReadOnly
from taskvm.fs.router import Router
from taskvm.fs.shadow import Shadow
from taskvm.fs.wrapper import Wrapper
from taskvm.wire.frames import FrameType, encode_header
from taskvm.wire.fuse import Opcode

GETATTR = bytes(16)
SLOW = b"private-name\0"


class Slow(Memory):
    """Looks nothing up before it is allowed to."""

    prompt = False

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Event()
        self.called = threading.Event()
        self.closed = threading.Event()
        self.forgotten: list[tuple[int, int]] = []

    def opened(self) -> Memory:
        return self

    def lookup(self, parent: int, name: bytes) -> Entry:
        self.called.set()
        assert self.allowed.wait(PATIENCE_S)
        return super().lookup(parent, name)

    def forget(self, node: int, count: int) -> None:
        self.forgotten.append((node, count))
        super().forget(node, count)

    def close(self) -> None:
        super().close()
        self.closed.set()


@pytest.fixture
def guest() -> Iterator[Guest]:
    with port_end() as guest:
        yield guest


@pytest.fixture
def mounted(guest: Guest) -> Iterator[Slow]:
    """Mount 1, beside the prompt mount 2."""
    provider = Slow()
    provider.create(1, SLOW[:-1], 0o644, 0)
    guest.server.add_mount(1, provider, name="/data")
    guest.server.add_mount(2, Memory())
    for mount in (1, 2):
        assert guest.ask(Opcode.INIT, 0, INIT, mount=mount) == 0
    yield provider
    provider.allowed.set()


@pytest.fixture
def slow(guest: Guest, mounted: Slow) -> Slow:
    """It is being asked for a name."""
    guest.send(Opcode.LOOKUP, 1, SLOW)
    assert mounted.called.wait(PATIENCE_S)
    return mounted


@pytest.fixture
def overdue(guest: Guest, mounted: Slow) -> Slow:
    """It has been asked for too long, and the guest has heard so."""
    mounted.request_deadline_s = 0.01
    guest.send(Opcode.LOOKUP, 1, SLOW)
    assert answer(guest) == (1, errno.ETIMEDOUT)
    mounted.request_deadline_s = PATIENCE_S
    return mounted


def answer(guest: Guest) -> tuple[int, int]:
    """Return whose the next answer is, and its errno."""
    frame = guest.receive()
    return frame.stream, -int(struct.unpack_from("<IiQ", frame.payload)[1])


def test_a_slow_mount_holds_up_nobody_else(guest: Guest, slow: Slow) -> None:
    for _ in range(3):
        assert guest.ask(Opcode.GETATTR, 1, GETATTR, mount=2) == 0

    slow.allowed.set()
    assert answer(guest) == (1, 0)


def test_what_waits_is_served_in_its_order(guest: Guest, slow: Slow) -> None:
    for opcode in (Opcode.RMDIR, Opcode.UNLINK, Opcode.UNLINK):
        guest.send(opcode, 1, SLOW)
    slow.allowed.set()

    answers = [answer(guest) for _ in range(4)]

    assert answers == [(1, 0), (1, errno.ENOTDIR), (1, 0), (1, errno.ENOENT)]


def test_who_waits_too_long_is_told_so_and_so_is_all_that_waits_behind(
    guest: Guest, mounted: Slow, caplog: pytest.LogCaptureFixture
) -> None:
    """Without anybody else asking for anything; the log says it, without the guest's names."""
    mounted.request_deadline_s = 0.05
    with caplog.at_level(logging.WARNING, "taskvm.fs"):
        guest.send(Opcode.LOOKUP, 1, SLOW)
        guest.send(Opcode.GETATTR, 1, GETATTR)
        answers = [answer(guest) for _ in range(2)]

    assert answers == [(1, errno.ETIMEDOUT)] * 2
    record = next(one for one in caplog.records if one.name == "taskvm.fs")
    assert "/data has not answered LOOKUP for 0.05 s" in record.getMessage()
    assert "private" not in caplog.text


def test_a_request_that_no_thread_has_taken_yet_has_an_end_too(
    guest: Guest, mounted: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server asks the lane once, as soon as the request is there; on a busy host the thread comes later."""
    lane = guest.server._lanes[1]
    begun = threading.Event()

    def read(descriptor: int) -> int:
        assert begun.wait(PATIENCE_S)
        return eventfd_read(descriptor)

    eventfd_read = os.eventfd_read
    monkeypatch.setattr(os, "eventfd_read", read)
    guest.send(Opcode.LOOKUP, 1, SLOW)
    wait_until(lambda: lane._waiting)
    due = lane.due
    begun.set()
    mounted.allowed.set()

    assert answer(guest) == (1, 0)
    assert due < math.inf
    assert lane.due == math.inf


def test_a_mount_that_hangs_refuses_at_once_and_comes_back(guest: Guest, overdue: Slow) -> None:
    """The answer that comes too late is dropped, and the reference in it is given back."""
    assert guest.ask(Opcode.GETATTR, 1, GETATTR) == errno.ETIMEDOUT
    guest.send(Opcode.FORGET, 2, struct.pack("<Q", 1))

    overdue.allowed.set()
    wait_until(lambda: guest.ask(Opcode.GETATTR, 1, GETATTR) == 0)

    assert overdue.forgotten == [(2, 1), (2, 1)]  # what is forgotten is never lost
    assert guest.ask(Opcode.LOOKUP, 1, SLOW) == 0


def test_a_mount_that_hangs_is_removed_and_its_number_free(
    guest: Guest, overdue: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CLOSE_PATIENCE_S", 0.01)

    guest.server.remove_mount(1)

    assert guest.ask(Opcode.GETATTR, 1, GETATTR) == errno.ENODEV
    guest.server.add_mount(1, Memory())
    assert guest.ask(Opcode.INIT, 0, INIT) == 0
    assert not overdue.closed.is_set()
    overdue.allowed.set()
    assert overdue.closed.wait(PATIENCE_S)


def test_closing_does_not_wait_for_a_provider(
    guest: Guest, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CLOSE_PATIENCE_S", 0.01)
    guest.server.close()
    assert not slow.closed.is_set()
    slow.allowed.set()
    assert slow.closed.wait(PATIENCE_S)


def test_opening_a_mount_holds_up_nobody(guest: Guest) -> None:
    """A HostDir on a server that does not answer."""
    opening, allowed = threading.Event(), threading.Event()

    class Unreachable(Provider):
        def opened(self) -> Provider:
            opening.set()
            assert allowed.wait(PATIENCE_S)
            return self

    adding = threading.Thread(target=guest.server.add_mount, args=(1, Unreachable()))
    adding.start()
    assert opening.wait(PATIENCE_S)

    guest.server.add_mount(2, Memory())
    assert guest.ask(Opcode.INIT, 0, INIT, mount=2) == 0

    allowed.set()
    adding.join(PATIENCE_S)
    assert guest.ask(Opcode.INIT, 0, INIT) == 0


def test_what_waits_for_a_slow_mount_is_bounded(
    guest: Guest, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of writes is refused, one of FORGETs dropped, and neither holds up the other mount."""
    monkeypatch.setattr(lane_module, "MAX_WAITING", 10_000)
    write = struct.pack("<QQIIQII", 0, 0, 4000, 0, 0, 1, 0) + bytes(4000)
    for _ in range(4):
        guest.send(Opcode.WRITE, 2, write)
    assert [answer(guest) for _ in range(2)] == [(1, errno.ENOMEM)] * 2
    for _ in range(1000):
        guest.send(Opcode.FORGET, 99, struct.pack("<Q", 1))

    assert guest.ask(Opcode.GETATTR, 1, GETATTR, mount=2) == 0
    assert guest.server._lanes[1]._size <= 10_000

    slow.allowed.set()
    assert [answer(guest) for _ in range(3)] == [(1, 0)] * 3
    assert guest.ask(Opcode.GETATTR, 1, GETATTR) == 0
    assert guest.server._lanes[1]._size == 0


def test_the_port_rests_when_a_slow_mount_has_answered(guest: Guest, slow: Slow) -> None:
    resting = threading.Thread(target=guest.server.quiesce)
    resting.start()
    assert guest.receive().type is FrameType.QUIESCE
    guest.sock.sendall(encode_header(FrameType.QUIESCED, 0, 0, 0))
    resting.join(0.05)
    assert resting.is_alive()

    slow.allowed.set()
    assert answer(guest) == (1, 0)
    resting.join(PATIENCE_S)
    assert not resting.is_alive()
    guest.server.resume()
    assert guest.receive().type is FrameType.RESUME


def test_the_port_does_not_rest_while_a_mount_hangs(
    guest: Guest, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Exception] = []

    def rest() -> None:
        try:
            guest.server.quiesce()
        except TimeoutError as error:
            failures.append(error)

    monkeypatch.setattr(server_module, "QUIESCE_TIMEOUT_S", 0.2)
    resting = threading.Thread(target=rest)
    resting.start()
    assert guest.receive().type is FrameType.QUIESCE
    guest.sock.sendall(encode_header(FrameType.QUIESCED, 0, 0, 0))
    resting.join(PATIENCE_S)
    assert len(failures) == 1


def test_a_mount_that_is_late_is_known_before_the_guest_is_asked_to_rest(
    guest: Guest, overdue: Slow
) -> None:
    with pytest.raises(TimeoutError, match="does not return"):
        guest.server.quiesce()
    assert guest.ask(Opcode.GETATTR, 1, GETATTR, mount=2) == 0


def test_a_kernel_that_breaks_the_protocol_on_a_slow_mount_is_told_on(
    guest: Guest, slow: Slow
) -> None:
    slow.allowed.set()
    guest.send(Opcode.INIT, 0, INIT)
    assert guest.failed.wait(PATIENCE_S)
    assert [type(error) for error in guest.failures] == [GuestProtocolError]


def test_a_slow_mount_hears_of_what_the_host_changes(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    guest.server.add_mount(1, Hooks(HostDir(tmp_path)))
    assert guest.ask(Opcode.INIT, 0, INIT) == 0
    assert guest.ask(Opcode.LOOKUP, 1, b"file\0") == 0
    assert 1 in guest.server._lanes

    (tmp_path / "file").unlink()

    code, unique = struct.unpack_from("<4xiQ", guest.receive().payload)
    assert (code, unique) == (3, 0)  # NOTIFY_INVAL_ENTRY


def test_a_guest_that_asks_without_a_pause_hears_of_what_the_host_changes(
    guest: Guest, tmp_path: Path
) -> None:
    """Two programs at work leave no moment in which nothing waits."""
    called, allowed = threading.Event(), threading.Event()

    def before(asked: Operation) -> None:
        if asked.path == "/slow":
            called.set()
            assert allowed.wait(PATIENCE_S)

    (tmp_path / "file").write_text("old")
    guest.server.add_mount(1, Hooks(HostDir(tmp_path), before=before))
    assert guest.ask(Opcode.INIT, 0, INIT) == 0
    assert guest.ask(Opcode.LOOKUP, 1, b"file\0") == 0
    for name in (b"slow\0", b"one\0", b"two\0"):
        guest.send(Opcode.LOOKUP, 1, name)
    assert called.wait(PATIENCE_S)

    (tmp_path / "file").unlink()
    allowed.set()

    codes = [struct.unpack_from("<4xiQ", guest.receive().payload) for _ in range(5)]
    assert codes.index((3, 0)) == 1  # NOTIFY_INVAL_ENTRY, before the answers to what waits
    assert [unique for _, unique in codes].count(8) == 3


def test_who_is_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's own disks and memory; nothing that runs code of the user's, and no file system of another host's."""
    local, memory = HostDir(tmp_path), Memory()
    prompt: list[Provider] = [
        *(local, memory, ReadOnly(local), Shadow(local, [".env"]), Quota(memory, limit_files=1)),
        Router({"/": local, "/a": memory}),
        *(one.opened() for one in (local, HostDir(tmp_path, mode="review"))),
    ]
    monkeypatch.setattr(hostdir_module, "LOCAL", frozenset())
    remote = HostDir(tmp_path)
    others: list[Provider] = [
        *(remote, Wrapper(memory), Hooks(memory), PathProvider(), ReadOnly(remote)),
        *(Shadow(remote, [".env"]), Router({"/": memory, "/a": remote}), Provider()),
    ]

    assert [one.prompt for one in prompt] == [True] * len(prompt)
    assert [one.prompt for one in others] == [False] * len(others)


def test_a_wrapper_waits_as_long_as_what_it_wraps() -> None:
    patient = PathProvider()
    patient.request_deadline_s = 500.0

    assert Hooks(ReadOnly(patient)).request_deadline_s == 500.0
    assert Router({"/": Memory(), "/a": patient}).request_deadline_s == 500.0
