"""The thread that serves the port: mounts come and go, the port comes to rest, and failures stay inside."""

from __future__ import annotations

import asyncio
import errno
import logging
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.port_end import INIT, Guest, port_end
from tests.support.waiting import PATIENCE_S

from taskvm.errors import GuestProtocolError, SandboxLostError, SandboxStateError, UsageError
from taskvm.fs import coherence as coherence_module
from taskvm.fs import server as server_module
from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.patience import Patience
from taskvm.fs.provider import Change, Entry, Provider
from taskvm.fs.server import FsServer
from taskvm.fs.session import Session
from taskvm.wire.frames import FrameType, encode_frame, encode_header
from taskvm.wire.fuse import WRITE_CACHE, Opcode
from taskvm.wire.fuse_replies import StatFs


@pytest.fixture
def guest() -> Iterator[Guest]:
    with port_end() as guest:
        yield guest


def served(guest: Guest) -> Provider:
    """Return what serves the mount 1."""
    return guest.server._mounts[1].provider


def test_a_provider_can_be_given_again(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    provider = HostDir(tmp_path)
    for mount in (1, 2):
        guest.server.add_mount(mount, provider)
        assert guest.ask(Opcode.INIT, 0, INIT, mount=mount) == 0
    guest.server.remove_mount(1)

    assert guest.ask(Opcode.LOOKUP, 1, b"file\0", mount=2) == 0


def test_mounts_are_served_side_by_side(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    guest.server.add_mount(1, HostDir(tmp_path))
    guest.server.add_mount(2, Memory())

    assert [guest.ask(Opcode.INIT, 0, INIT, mount=mount) for mount in (1, 2)] == [0, 0]
    assert guest.ask(Opcode.LOOKUP, 1, b"file\0", mount=1) == 0
    guest.send(Opcode.LOOKUP, 1, b"file\0", mount=2)
    reply = bytes(guest.receive().payload)
    assert struct.unpack_from("<IiQQ", reply) == (16 + 128, 0, 8, 0)  # a name that may be forgotten


def test_a_removed_mount_is_gone_and_closed(guest: Guest, tmp_path: Path) -> None:
    guest.server.add_mount(1, HostDir(tmp_path))
    guest.ask(Opcode.INIT, 0, INIT)
    provider = served(guest)

    guest.server.remove_mount(1)
    guest.server.remove_mount(1)

    assert guest.ask(Opcode.GETATTR, 1, bytes(16)) == errno.ENODEV
    assert isinstance(provider, HostDir)
    assert provider._tree.root == -1
    guest.server.add_mount(1, Memory())
    assert guest.ask(Opcode.INIT, 0, INIT) == 0


@pytest.mark.parametrize("mount_id", [0, -1, 2**31])
def test_a_mount_id_outside_the_hosts_range_is_refused(guest: Guest, mount_id: int) -> None:
    with pytest.raises(UsageError, match="out of range"):
        guest.server.add_mount(mount_id, Memory())


def test_a_mount_id_is_used_once(guest: Guest) -> None:
    guest.server.add_mount(1, Memory())
    with pytest.raises(UsageError, match="taken"):
        guest.server.add_mount(1, Memory())


def test_closing_is_idempotent_and_final(guest: Guest, tmp_path: Path) -> None:
    guest.server.add_mount(1, HostDir(tmp_path))
    provider = served(guest)

    guest.server.close()
    guest.server.close()

    assert isinstance(provider, HostDir)
    assert provider._tree.root == -1
    assert guest.sock.recv(1) == b""
    with pytest.raises(SandboxStateError):
        guest.server.add_mount(2, Memory())
    with pytest.raises(SandboxLostError):
        guest.server.quiesce()
    assert guest.failures == []


def test_the_port_comes_to_rest_and_goes_on(guest: Guest) -> None:
    guest.server.add_mount(1, Memory())
    guest.ask(Opcode.INIT, 0, INIT)
    resting = threading.Thread(target=guest.server.quiesce)
    resting.start()

    assert guest.receive().type is FrameType.QUIESCE
    guest.send(Opcode.GETATTR, 1, bytes(16))
    guest.sock.sendall(encode_header(FrameType.QUIESCED, 0, 0, 0))
    resting.join(0.1)
    assert resting.is_alive()  # an answer is not read yet
    assert guest.receive().type is FrameType.FUSE
    resting.join(PATIENCE_S)
    assert not resting.is_alive()

    guest.server.resume()
    assert guest.receive().type is FrameType.RESUME


def test_a_guest_that_never_rests_is_given_up(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "QUIESCE_TIMEOUT_S", 0.05)
    with pytest.raises(TimeoutError, match="QUIESCE"):
        guest.server.quiesce()


def test_a_rest_that_is_given_up_ends_and_its_late_answer_is_nobody_elses(guest: Guest) -> None:
    """After `resume` nothing is sent that would stop the guest, and the next round waits for an answer of its own."""
    given_up, failures = threading.Event(), []

    def rest(given_up: threading.Event | None = None) -> None:
        try:
            guest.server.quiesce(given_up)
        except TimeoutError as error:
            failures.append(error)

    first = threading.Thread(target=rest, args=[given_up])
    first.start()
    assert guest.receive().type is FrameType.QUIESCE
    given_up.set()
    first.join(PATIENCE_S)
    guest.server.resume()
    assert guest.receive().type is FrameType.RESUME
    second = threading.Thread(target=rest)
    second.start()
    assert guest.receive().type is FrameType.QUIESCE
    quiesced = encode_header(FrameType.QUIESCED, 0, 0, 0)
    guest.sock.sendall(quiesced)
    second.join(0.2)
    assert second.is_alive()
    guest.sock.sendall(quiesced)
    second.join(PATIENCE_S)

    assert not second.is_alive()
    assert len(failures) == 1


def test_a_rest_that_is_given_up_before_it_began_asks_nothing(guest: Guest) -> None:
    """A provider is being called: the guest goes on, and is not stopped when the call returns."""
    given_up = threading.Event()
    given_up.set()
    with guest.server._serving, pytest.raises(TimeoutError):
        guest.server.quiesce(given_up)
    guest.server.resume()

    assert guest.receive().type is FrameType.RESUME


def test_a_rest_is_given_up_though_an_answer_is_not_read(guest: Guest) -> None:
    """A thread that sends one has the lock until the guest reads."""
    given_up = threading.Event()
    given_up.set()
    with guest.server._sending, pytest.raises(TimeoutError, match="not read"):
        guest.server.quiesce(given_up)


def test_a_rest_that_was_given_up_unasked_leaves_the_next_one_its_answer(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread begins to send an answer just before QUIESCE is, and the guest is slow to read."""
    given_up = threading.Event()
    given_up.set()
    then = _then_blocked(guest.server)
    with monkeypatch.context() as slow:
        slow.setattr(guest.server, "_rest", then)
        with pytest.raises(TimeoutError, match="not read"):
            guest.server.quiesce(given_up)
    guest.server._sending.release()
    again = threading.Thread(target=guest.server.quiesce)
    again.start()
    assert guest.receive().type is FrameType.QUIESCE
    guest.sock.sendall(encode_header(FrameType.QUIESCED, 0, 0, 0))
    again.join(PATIENCE_S)

    assert not again.is_alive()


def _then_blocked(server: FsServer) -> Callable[..., None]:
    rest = server._rest

    def both(*patience: Patience) -> None:
        rest(*patience)
        server._sending.acquire()

    return both


def test_an_answer_that_nobody_asked_for_ends_the_guest(guest: Guest) -> None:
    guest.sock.sendall(encode_header(FrameType.QUIESCED, 0, 0, 0))

    assert guest.failed.wait(PATIENCE_S)
    assert [type(error) for error in guest.failures] == [GuestProtocolError]


def test_a_port_that_ends_while_it_comes_to_rest_is_lost(guest: Guest) -> None:
    errors: list[Exception] = []

    def rest() -> None:
        try:
            guest.server.quiesce()
        except SandboxLostError as error:
            errors.append(error)

    resting = threading.Thread(target=rest)
    resting.start()
    guest.receive()
    guest.sock.close()
    resting.join(PATIENCE_S)

    assert len(errors) == 1


def test_a_port_that_is_closed_while_its_last_answers_are_not_read_is_lost(guest: Guest) -> None:
    """A sandbox is closed while it is being saved."""
    guest.server.add_mount(1, Memory())
    guest.ask(Opcode.INIT, 0, INIT)
    errors: list[Exception] = []
    glanced = threading.Event()

    def rest() -> None:
        try:
            guest.server.quiesce()
        except Exception as error:  # noqa: BLE001 - the test judges it
            errors.append(error)

    is_read = guest.server._is_read
    guest.server._is_read = lambda span_s: glanced.set() or is_read(span_s)  # type: ignore[method-assign,func-returns-value]  # told when it waits
    resting = threading.Thread(target=rest)
    resting.start()
    assert guest.receive().type is FrameType.QUIESCE
    guest.send(Opcode.GETATTR, 1, bytes(16))
    guest.sock.sendall(encode_header(FrameType.QUIESCED, 0, 0, 0))
    assert glanced.wait(PATIENCE_S)
    guest.server.close()
    resting.join(PATIENCE_S)

    assert [type(error) for error in errors] == [SandboxLostError]


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff" * 64,
        encode_frame(FrameType.DATA, 0, 1, b"data"),
        encode_header(FrameType.RESUME, 0, 0, 0),
        encode_frame(FrameType.FUSE, 0, 1, bytes(40)),
        encode_header(FrameType.FUSE, 0, 1, (1 << 20) + 65537),
    ],
)
def test_a_guest_that_breaks_the_protocol_is_told_on(guest: Guest, raw: bytes) -> None:
    guest.server.add_mount(1, Memory())

    guest.sock.sendall(raw)

    assert guest.failed.wait(timeout=PATIENCE_S)
    assert [type(error) for error in guest.failures] == [GuestProtocolError]
    assert guest.sock.recv(1) == b""


def test_requests_before_init_break_the_protocol(guest: Guest) -> None:
    guest.server.add_mount(1, Memory())
    guest.send(Opcode.GETATTR, 1, bytes(16))
    assert guest.failed.wait(timeout=PATIENCE_S)


def test_a_second_init_breaks_the_protocol(guest: Guest) -> None:
    guest.server.add_mount(1, Memory())
    guest.ask(Opcode.INIT, 0, INIT)
    guest.send(Opcode.INIT, 0, INIT)
    assert guest.failed.wait(timeout=PATIENCE_S)


def test_changes_reach_the_guest_as_notifications(guest: Guest) -> None:
    guest.server.add_mount(1, Memory())
    guest.ask(Opcode.INIT, 0, INIT)
    provider = served(guest)

    provider.changes(Change(1, b"name"))
    provider.changes(Change(5))

    codes = [struct.unpack_from("<IiQ", guest.receive().payload) for _ in range(2)]
    assert [(code, unique) for _length, code, unique in codes] == [(3, 0), (2, 0)]


def test_changes_after_the_end_are_nobodys_error(guest: Guest) -> None:
    guest.server.add_mount(1, Memory())
    provider = served(guest)
    guest.server.close()
    provider.changes(Change(1))


class Broken(Provider):
    """A provider with a bug."""

    def lookup(self, parent: int, name: bytes) -> Entry:
        raise RuntimeError(f"could not look up {name!r}")


def test_a_bug_of_a_provider_is_eio_and_reported_once_without_contents(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    guest.server.add_mount(1, Broken())
    guest.ask(Opcode.INIT, 0, INIT)

    with caplog.at_level(logging.ERROR, "taskvm.fs"):
        answers = [guest.ask(Opcode.LOOKUP, 1, b"private\0") for _ in range(3)]

    assert answers == [errno.EIO] * 3
    ours = [record.getMessage() for record in caplog.records if record.name == "taskvm.fs"]
    assert ours == ["LOOKUP failed with RuntimeError, a bug: the guest got EIO"]


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        (Opcode.OPEN, errno.ENOSYS),
        (Opcode.OPENDIR, errno.ENOSYS),
        (Opcode.ACCESS, errno.ENOSYS),
        (Opcode.FLUSH, errno.ENOSYS),
        (4242, errno.ENOSYS),
    ],
)
def test_what_the_kernel_does_by_itself_is_left_to_it(
    guest: Guest, opcode: int, expected: int
) -> None:
    guest.server.add_mount(1, Memory())
    guest.ask(Opcode.INIT, 0, INIT)
    assert guest.ask(opcode, 1, bytes(16)) == expected


def test_listings_are_kept_only_while_what_is_told_lasts(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coherence_module, "LOCAL", frozenset())
    guest.server.add_mount(1, HostDir(tmp_path))
    guest.ask(Opcode.INIT, 0, INIT)

    guest.send(Opcode.OPENDIR, 1, bytes(8))

    # No FOPEN_CACHE_DIR, and no handle that would have to be released.
    assert bytes(guest.receive().payload) == struct.pack("<IiQ", 32, 0, 8) + bytes(16)
    assert guest.ask(Opcode.RELEASEDIR, 1, bytes(24)) == 0


def test_a_kernel_that_gets_no_attributes_stops_asking(guest: Guest) -> None:
    provider = Memory()
    provider.xattrs = False
    guest.server.add_mount(1, provider)
    guest.ask(Opcode.INIT, 0, INIT)
    assert guest.ask(Opcode.GETXATTR, 1, struct.pack("<II", 0, 0) + b"user.a\0") == errno.ENOSYS


def test_many_requests_sent_at_once_are_all_answered_in_order(guest: Guest) -> None:
    guest.server.add_mount(1, Memory())
    guest.ask(Opcode.INIT, 0, INIT)
    requests = b"".join(
        encode_frame(
            FrameType.FUSE,
            0,
            1,
            struct.pack("<IIQQIIIHH", 56, Opcode.GETATTR, number, 1, 0, 0, 0, 0, 0) + bytes(16),
        )
        for number in range(2000)
    )
    sender = threading.Thread(target=guest.sock.sendall, args=(requests,))
    sender.start()

    answered = [struct.unpack_from("<IiQ", guest.receive().payload)[2] for _ in range(2000)]

    sender.join()
    assert answered == list(range(2000))


class Careless(Provider):
    """A provider that raises where nobody is answered, and answers more than was asked for."""

    def forget(self, node: int, count: int) -> None:
        raise OSError(errno.EIO, "a connection was lost")

    def rest(self) -> None:
        raise RuntimeError("a bug")

    def read(self, node: int, offset: int, size: int) -> bytes:
        return bytes(2 << 20)

    def readlink(self, node: int) -> bytes:
        return bytes(5000)

    def statfs(self, node: int) -> StatFs:
        raise asyncio.CancelledError


def test_no_bug_of_a_provider_ends_the_port(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises and wherever, and whatever it returns."""
    rested = threading.Event()
    monkeypatch.setattr(server_module, "REST_AFTER_S", 0.01)
    monkeypatch.setattr(Session, "rest", _then(Session.rest, rested.set))
    guest.server.add_mount(1, Careless())
    guest.ask(Opcode.INIT, 0, INIT)

    guest.send(Opcode.FORGET, 1, struct.pack("<Q", 1))
    guest.send(Opcode.BATCH_FORGET, 0, struct.pack("<IIQQ", 1, 0, 1, 1))
    answers = [
        guest.ask(Opcode.READ, 1, struct.pack("<QQIIQII", 0, 0, 4096, 0, 0, 0, 0)),
        guest.ask(Opcode.READLINK, 1),
        guest.ask(Opcode.STATFS, 1),
    ]
    assert rested.wait(PATIENCE_S)

    assert answers == [errno.EIO] * 3
    assert guest.ask(Opcode.LOOKUP, 1, b"file\0") == errno.ENOENT
    assert guest.failures == []
    reported = {record.getMessage().split()[0] for record in caplog.records}
    assert {"FORGET", "rest", "READ", "READLINK", "STATFS"} <= reported


def _then(first: Callable[[Session], None], second: Callable[[], None]) -> Callable[..., None]:
    def both(session: Session) -> None:
        first(session)
        second()

    return both


def test_a_bug_of_the_server_ends_the_sandbox_instead_of_leaving_it_waiting(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Session, "handle", broken)
    guest.server.add_mount(1, Memory())
    guest.send(Opcode.INIT, 0, INIT)

    assert guest.failed.wait(PATIENCE_S)
    assert [type(error) for error in guest.failures] == [SandboxLostError]
    assert guest.sock.recv(1) == b""


class Halting(Memory):
    """Writes at most three bytes at once, and no more than nine in all."""

    written = 0

    def opened(self) -> Memory:
        return self

    def write(self, node: int, offset: int, data: memoryview, *, append: bool) -> int:
        if self.written == 9:
            raise OSError(errno.ENOSPC, "full")
        self.written += 3
        return super().write(node, offset, data[:3], append=append)


@pytest.mark.parametrize(("size", "expected"), [(9, 0), (10, errno.ENOSPC)])
def test_what_was_written_to_a_mapping_is_written_whole_or_an_error(
    guest: Guest, size: int, expected: int
) -> None:
    """The kernel does not look at how much was written when it cleans pages."""
    provider = Halting()
    file = provider.create(1, b"file", 0o644, 0).node
    guest.server.add_mount(1, provider)
    guest.ask(Opcode.INIT, 0, INIT)

    head = struct.pack("<QQIIQII", 0, 0, size, WRITE_CACHE, 0, 0, 0)
    assert guest.ask(Opcode.WRITE, file, head + b"0123456789"[:size]) == expected

    assert provider.read(file, 0, 99) == b"012345678"
