"""Copying out of a guest that lies: whatever it says, nothing is written but below the target (taskvm.treecopy).

The agent is played by the test, so that it can say what a real kernel never would. Judged by the host's directories.
"""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from taskvm import CopyError, CopyLimits, Files, HostError, TaskvmError
from taskvm.background import Background
from taskvm.errors import SandboxLostError
from taskvm.vm.control import Control
from taskvm.wire.frames import (
    INITIAL_CREDIT,
    Frame,
    FrameDecoder,
    FrameType,
    decode_u32,
    encode_frame,
    encode_u32,
)

DIRECTORY = {"type": "dir", "mode": 0o755, "size": 0, "mtime_ns": 0}
FILE = {"type": "file", "mode": 0o644, "size": 1, "mtime_ns": 0}
LINK = {"type": "symlink", "mode": 0o777, "size": 1, "mtime_ns": 0}
STATUS = {"uid": 0, "gid": 0, "nlink": 1, "ino": 1}
LIMITS = CopyLimits(max_entries=500, max_bytes=1024 * 1024)


@dataclass
class Liar:
    """An agent's side of the control port. `lists` says what a path holds; `on_read` runs at each read."""

    sock: socket.socket
    root: dict[str, object] = field(default_factory=lambda: dict(DIRECTORY))
    lists: Callable[[str], list[dict[str, object]]] = lambda path: []
    target: bytes = b"/etc/passwd"
    endless: bool = False
    on_read: Callable[[], None] = lambda: None

    async def run(self) -> None:
        decoder = FrameDecoder()
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self.sock, 65536):
            for frame in decoder.feed(data):
                await self._answer(frame)

    async def _answer(self, frame: Frame) -> None:
        if frame.type is FrameType.CREDIT:
            await self._data(frame.stream, bytes(decode_u32(frame.payload)))
        if frame.type is not FrameType.OPEN:
            return
        request = msgspec.msgpack.decode(frame.payload)
        path = os.fsdecode(request.get("path", b""))
        await getattr(self, f"_{request['op']}")(frame.stream, path)

    async def _stat(self, stream: int, path: str) -> None:
        await self._send(FrameType.REPLY, stream, msgspec.msgpack.encode(self.root | STATUS))

    async def _readlink(self, stream: int, path: str) -> None:
        reply = msgspec.msgpack.encode({"target": self.target})
        await self._send(FrameType.REPLY, stream, reply)

    async def _list(self, stream: int, path: str) -> None:
        maps = [msgspec.msgpack.encode(entry) for entry in self.lists(path)]
        await self._send(FrameType.REPLY, stream, msgspec.msgpack.encode({}))
        await self._data(stream, b"".join(encode_u32(len(item)) + item for item in maps))
        await self._send(FrameType.END, stream, channel=1)

    async def _read(self, stream: int, path: str) -> None:
        self.on_read()
        reply = msgspec.msgpack.encode({"size": 1, "mode": 0o4755, "mtime_ns": 0})
        await self._send(FrameType.REPLY, stream, reply)
        await self._data(stream, bytes(INITIAL_CREDIT) if self.endless else b"x")
        if not self.endless:
            await self._send(FrameType.END, stream, channel=1)

    async def _data(self, stream: int, data: bytes) -> None:
        for start in range(0, len(data), 65536):
            await self._send(FrameType.DATA, stream, data[start : start + 65536], channel=1)

    async def _send(
        self, kind: FrameType, stream: int, payload: bytes = b"", channel: int = 0
    ) -> None:
        frame = encode_frame(kind, channel, stream, payload)
        await asyncio.get_running_loop().sock_sendall(self.sock, frame)


@pytest.fixture
async def liar() -> AsyncIterator[tuple[Liar, Files]]:
    """A guest to be told what to say, and the files of its sandbox."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    control = await Control.open(ours)
    guest = Liar(theirs)
    failures: list[BaseException] = []
    background = Background(failures.append)
    background.start(_serve(guest), "the liar")
    yield guest, Files(control, 1000, 1000)
    control.close(SandboxLostError("test", "over"))
    await background.aclose()
    theirs.close()
    assert failures == []


async def _serve(guest: Liar) -> None:
    with contextlib.suppress(ConnectionError):
        await guest.run()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where to copy to, alone in its directory."""
    (tmp_path / "to").mkdir()
    return tmp_path / "to" / "copy"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of the host's that nothing may touch."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("precious")
    return tmp_path / "victim"


def named(name: bytes, **facts: object) -> dict[str, object]:
    return {"name": name, **FILE, **facts}


@pytest.mark.parametrize(
    "name",
    [b"", b".", b"..", b"/", b"../victim/file", b"a/b", b"/tmp/x", b"..\0", b"a\0b"],
)
@pytest.mark.parametrize("kind", [FILE, DIRECTORY, LINK])
async def test_a_name_that_is_no_component_ends_the_sandbox(
    liar: tuple[Liar, Files], target: Path, victim: Path, name: bytes, kind: dict[str, object]
) -> None:
    """The kernel lets no directory hold such a name: only a replaced agent says it."""
    guest, files = liar
    guest.lists = lambda path: [{"name": name, **kind}]

    with pytest.raises(SandboxLostError):
        await files.copy_out("/t", target, limits=LIMITS)

    assert list(target.parent.iterdir()) == []
    assert (victim / "file").read_text() == "precious"


@pytest.mark.parametrize("second", [FILE, DIRECTORY, LINK])
async def test_a_link_and_then_something_of_its_name_is_not_written_through(
    liar: tuple[Liar, Files], target: Path, victim: Path, second: dict[str, object]
) -> None:
    """The name comes twice: as a link to the victim, then as what would be written into it."""
    guest, files = liar
    guest.target = bytes(victim)
    guest.lists = lambda path: (
        [{"name": b"d", **LINK}, {"name": b"d", **second}]
        if path == "/t"
        else [named(b"file"), named(b"new")]
    )

    with pytest.raises(HostError):
        await files.copy_out("/t", target, limits=LIMITS)

    assert [path.name for path in victim.iterdir()] == ["file"]
    assert (victim / "file").read_text() == "precious"
    assert list(target.parent.iterdir()) == []


async def test_a_folder_changed_under_the_copy_leads_nowhere_else(
    liar: tuple[Liar, Files], target: Path, victim: Path
) -> None:
    """The target lies in a folder shared with the guest, which puts a link in the place of a directory being filled."""
    guest, files = liar

    def swap() -> None:
        (inner,) = target.parent.glob(".taskvm-copy-*/copy/d")
        inner.rename(inner.with_name("moved"))
        inner.symlink_to(victim)
        guest.on_read = lambda: None

    guest.on_read = swap
    guest.lists = lambda path: (
        [{"name": b"d", **DIRECTORY}]
        if path == "/t"
        else [named(b"1"), named(b"file"), {"name": b"link", **LINK}]
        if path == "/t/d"
        else []
    )

    await files.copy_out("/t", target, limits=LIMITS)

    assert [path.name for path in victim.iterdir()] == ["file"]
    assert (target / "moved" / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("lists", "endless", "words"),
    [
        (lambda path: [{"name": b"d", **DIRECTORY}], False, "directories deep"),
        (lambda path: [{"name": b"%d" % n, **DIRECTORY} for n in range(90)], False, "than 500"),
        (lambda path: [named(b"f")], True, "than 1048576 bytes"),
    ],
)
async def test_a_tree_without_end_is_ended(
    liar: tuple[Liar, Files],
    target: Path,
    lists: Callable[[str], list[dict[str, object]]],
    endless: bool,
    words: str,
) -> None:
    """Depth, count and bytes are each bounded, and what was copied until then is removed."""
    guest, files = liar
    guest.lists, guest.endless = lists, endless

    with pytest.raises(CopyError, match=words):
        await files.copy_out("/t", target, limits=LIMITS)

    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("kind", [FILE, DIRECTORY])
async def test_a_file_without_end_leaves_the_hosts_disk_its_floor(
    liar: tuple[Liar, Files], target: Path, kind: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less free every sandbox of this host would be ended: one guest's file must not do that."""
    guest, files = liar
    guest.root, guest.lists, guest.endless = dict(kind), lambda path: [named(b"x")], True
    monkeypatch.setattr("taskvm.treecopy.LOOK_BYTES", INITIAL_CREDIT)
    monkeypatch.setattr("taskvm.treecopy.spare_bytes", lambda directory: 1 << 60)

    with pytest.raises(CopyError, match="must remain for sandboxes"):
        await files.copy_out("/t", target)

    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("kind", ["fifo", "socket", "block", "char"])
async def test_no_special_file_is_made(liar: tuple[Liar, Files], target: Path, kind: str) -> None:
    guest, files = liar
    guest.lists = lambda path: [named(b"x", type=kind)]

    with pytest.raises(CopyError, match=kind):
        await files.copy_out("/t", target, limits=LIMITS)

    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6777])
async def test_nothing_is_set_to_another_users_rights(
    liar: tuple[Liar, Files], target: Path, mode: int
) -> None:
    """A setuid file is refused; a setgid or sticky directory comes without the bit."""
    guest, files = liar
    guest.lists = lambda path: [named(b"x", mode=mode)]
    with pytest.raises(CopyError, match="setuid"):
        await files.copy_out("/t", target, limits=LIMITS)
    guest.root, guest.lists = DIRECTORY | {"mode": mode | 0o1000}, lambda path: []

    await files.copy_out("/t", target, limits=LIMITS)

    assert stat.S_IMODE(target.stat().st_mode) == mode & 0o777 | 0o700


@pytest.mark.parametrize("mtime_ns", [-(2**63), -1, 2**62, 2**63 - 1, 2**64 - 1])
async def test_no_time_is_too_strange(
    liar: tuple[Liar, Files], target: Path, mtime_ns: int
) -> None:
    """A time that no host takes becomes the nearest that all do."""
    guest, files = liar
    guest.lists = lambda path: [named(b"x", mtime_ns=mtime_ns)]

    await files.copy_out("/t", target, limits=LIMITS)

    assert (target / "x").read_bytes() == b"x"


@pytest.mark.parametrize("text", [b"", b"a\0b", b"x" * 5000])
async def test_a_link_to_what_cannot_be_is_refused(
    liar: tuple[Liar, Files], target: Path, text: bytes
) -> None:
    guest, files = liar
    guest.lists, guest.target = lambda path: [{"name": b"link", **LINK}], text

    with pytest.raises(TaskvmError):
        await files.copy_out("/t", target, limits=LIMITS)

    assert list(target.parent.iterdir()) == []


async def test_a_link_is_made_and_not_followed(
    liar: tuple[Liar, Files], target: Path, victim: Path
) -> None:
    """A link in the tree that leads to the victim is only a link; its mode and time are not set on the victim."""
    guest, files = liar
    guest.lists = lambda path: [{"name": b"link", **LINK, "mode": 0o777}]
    guest.target = bytes(victim / "file")
    before = (victim / "file").stat()

    await files.copy_out("/t", target, limits=LIMITS)

    assert (target / "link").is_symlink()
    assert (victim / "file").stat() == before


async def test_a_copy_is_never_a_link_itself(
    liar: tuple[Liar, Files], target: Path, victim: Path
) -> None:
    """Who reads the copy reads no file of the host's, also when the guest calls a link what it was to follow."""
    guest, files = liar
    guest.root, guest.target = dict(LINK), bytes(victim / "file")

    with pytest.raises(CopyError, match="does not say what it leads to"):
        await files.copy_out("/t", target, limits=LIMITS)

    assert list(target.parent.iterdir()) == []


async def test_a_cancelled_copy_leaves_nothing(liar: tuple[Liar, Files], target: Path) -> None:
    """In the middle of an endless file, with its bytes on their way to the disk."""
    guest, files = liar
    guest.endless = True
    guest.root = dict(FILE)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await files.copy_out("/t", target)

    assert list(target.parent.iterdir()) == []
