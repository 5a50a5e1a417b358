"""What waits for a disk waits aside: taskvm.fs.aside, and fsync through the server."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.port_end import INIT, Guest, port_end
from tests.support.waiting import PATIENCE_S

from taskvm.fs.aside import MOST, Aside
from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.wire.frames import FrameType, encode_header
from taskvm.wire.fuse import Opcode

FSYNC = bytes(16)


class Disk:
    """Stands for one that takes its time: what is synced waits until it is `ready`."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.ready = threading.Event()
        self.error = 0

    def sync(self, fd: int) -> None:
        os.fstat(fd)  # it is open
        self.begun.release()
        assert self.ready.wait(PATIENCE_S)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    slow = Disk()
    monkeypatch.setattr(os, "fsync", slow.sync)
    yield slow
    slow.ready.set()


@pytest.fixture
def guest(tmp_path: Path, disk: Disk) -> Iterator[Guest]:
    """With two mounts of a directory with a file, which is the node 2 of the first."""
    (tmp_path / "file").touch()
    with port_end() as end:
        for mount in (1, 2):
            end.server.add_mount(mount, HostDir(tmp_path))
            assert end.ask(Opcode.INIT, 0, INIT, mount=mount) == 0
        assert end.ask(Opcode.LOOKUP, 1, b"file\0") == 0
        yield end
        disk.ready.set()


def outcome(guest: Guest) -> tuple[int, int]:
    frame = guest.receive()
    return frame.stream, -int(struct.unpack_from("<IiQ", frame.payload)[1])


@pytest.mark.parametrize("error", [0, errno.EIO])
def test_a_slow_disk_holds_up_who_waits_for_it_and_nobody_else(
    guest: Guest, disk: Disk, error: int
) -> None:
    disk.error = error
    guest.send(Opcode.FSYNC, 2, FSYNC)
    guest.send(Opcode.FSYNCDIR, 1, FSYNC)
    for _ in range(2):
        assert disk.begun.acquire(timeout=PATIENCE_S)

    assert guest.ask(Opcode.LOOKUP, 1, b"file\0", mount=2) == 0
    assert guest.ask(Opcode.GETATTR, 2, bytes(16), mount=1) == 0
    guest.server.remove_mount(2)

    disk.ready.set()
    assert [outcome(guest), outcome(guest)] == [(1, error)] * 2


def test_the_port_comes_to_rest_when_all_is_synced(guest: Guest, disk: Disk) -> None:
    guest.send(Opcode.FSYNC, 2, FSYNC)
    assert disk.begun.acquire(timeout=PATIENCE_S)
    resting = threading.Thread(target=guest.server.quiesce)
    resting.start()
    assert guest.receive().type is FrameType.QUIESCE
    guest.sock.sendall(encode_header(FrameType.QUIESCED, 0, 0, 0))

    resting.join(0.05)
    assert resting.is_alive()
    disk.ready.set()

    assert outcome(guest) == (1, 0)
    resting.join(PATIENCE_S)
    assert not resting.is_alive()


def test_a_file_server_ends_before_the_disk_is_ready(guest: Guest, disk: Disk) -> None:
    guest.send(Opcode.FSYNC, 2, FSYNC)
    assert disk.begun.acquire(timeout=PATIENCE_S)

    guest.server.close()

    assert not disk.ready.is_set()


def test_what_a_provider_syncs_itself_is_answered_at_once(guest: Guest) -> None:
    guest.server.add_mount(3, Memory())
    assert guest.ask(Opcode.INIT, 0, INIT, mount=3) == 0
    assert guest.ask(Opcode.FSYNC, 1, FSYNC, mount=3) == 0


def test_who_finds_no_thread_free_does_it_alone() -> None:
    aside, ready, done = Aside(), threading.Event(), threading.Semaphore(0)

    def call() -> None:
        ready.wait(PATIENCE_S)
        done.release()

    assert [aside.run(call) for _ in range(MOST + 1)] == [True] * MOST + [False]
    ready.set()
    aside.finish()
    assert all(done.acquire(blocking=False) for _ in range(MOST))
    assert aside.run(call)
    aside.finish()
    aside.close()
    aside.close()
    assert not aside.run(call)
