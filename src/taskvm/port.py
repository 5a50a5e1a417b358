"""The asyncio shell over the frame codec: one port of the guest, and the credit-managed flows inside it.

`FramePort` moves frames and knows nothing of their meaning. `Inlet` and `Outlet` are the two ends of a flow, one for
each (stream, channel): who reads frames from the port feeds them.

Rule 1: memory is bounded. An Inlet holds at most the credit it granted; an Outlet holds nothing.
Rule 2: a guest that breaks a rule gets GuestProtocolError, handed to `on_lost`, and the port is closed.
Rule 3: everything here belongs to the event loop that opened the port; no locks.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import cast

from taskvm.errors import GuestProtocolError, SandboxLostError, UsageError
from taskvm.wire.frames import (
    INITIAL_CREDIT,
    MAX_DATA,
    MAX_MAP,
    MAX_PAYLOAD,
    Frame,
    FrameDecoder,
    FrameError,
    FrameType,
    encode_header,
    encode_u32,
)

# Above this many unsent bytes writers wait; QEMU takes a megabyte in about 10 ms.
WRITE_HIGH_WATER = 512 * 1024
# A window cannot grow past this (protocol page, Credit).
MAX_CREDIT = 2**31 - 1
# A guest that is starved of CPU by 50 neighbours answered after 14 s (vm/control.py, PROBE_TIMEOUT_S).
QUIESCE_TIMEOUT_S = 30.0
# A guest may send 20,000 empty frames in one read, 60 ms of work: the loop's other sandboxes get a turn in between.
FRAMES_PER_TURN = 512


def check_fits(operation: str, payload: bytes) -> bytes:
    """Return a map that is to be sent, unless no peer would take it: a frame that is too long ends the port.

    Raises UsageError.
    """
    if len(payload) > MAX_MAP:
        raise UsageError(
            operation,
            f"it takes {len(payload) >> 10} KiB to be said, and {MAX_MAP >> 10} are the most",
            "Pass long arguments and variables through a file, or through stdin",
        )
    return payload


class StreamReset(ConnectionError):  # noqa: N818 - named after what happened, like ConnectionReset
    """Raised by a flow whose stream the other side reset. `errno` is the reason it gave."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno, "the guest reset the stream")


class FramePort(asyncio.Protocol):
    """One virtio-serial port, seen from the host.

    Set `on_frame` and `on_lost` before the first await after `open`. `on_lost` is called once, with the reason.
    """

    def __init__(self, name: str, max_payload: int = MAX_PAYLOAD) -> None:
        self.name = name
        self.on_frame: Callable[[Frame], None] = lambda frame: None
        self.on_lost: Callable[[Exception], None] = lambda error: None
        self.on_held: Callable[[], None] = lambda: None
        # Asked when the peer has closed the port: calls back, soon, with words for the reason.
        self.explain_end: Callable[[Callable[[str], None]], None] = lambda tell: tell("")
        self.frames: int = 0  # that have moved, in either direction
        self._held: list[bytes] | None = None
        self._decoder = FrameDecoder(max_payload)
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._full = False  # of what the transport has not sent yet
        self._coming_to_rest: deque[asyncio.Future[None]] = deque()  # each QUIESCE is answered
        self._lost: Exception | None = None
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(
        cls, sock: socket.socket, name: str, max_payload: int = MAX_PAYLOAD
    ) -> FramePort:
        """Take over `sock`, the host's end of the port named `name`."""
        loop = asyncio.get_running_loop()
        port = cls(name, max_payload)
        await loop.create_connection(lambda: port, sock=sock)
        return port

    # Sending.

    def send(
        self,
        kind: FrameType,
        channel: int,
        stream: int,
        payload: bytes | memoryview = b"",
        *,
        urgent: bool = False,
    ) -> None:
        """Queue one frame; an `urgent` one even while the port is held. `wait_writable` bounds the queue.

        Raises SandboxLostError when the port is gone.
        """
        if self._transport is None or self._lost is not None:
            raise self.make_lost_error("write to", str(self._lost or "it is closed"))
        self.frames += 1
        header = encode_header(kind, channel, stream, len(payload))
        if self._held is not None and not urgent:
            self._held.append(header + payload)
            self.on_held()
        elif len(payload) < 4096:
            self._transport.write(header + payload)
        else:
            self._transport.writelines((header, payload))

    async def wait_writable(self) -> None:
        """Wait until fewer than WRITE_HIGH_WATER bytes are queued, or the port is gone."""
        await self._writable.wait()

    def hold(self) -> None:
        """Keep what is sent, and let writers wait, until `release`. `on_held` is called for each frame that is kept."""
        self._held = []
        self._writable.clear()

    def release(self) -> None:
        """Send what was held, in its order, and go on. Idempotent."""
        held, self._held = self._held or [], None
        if not self._full:
            self._writable.set()
        if self._transport is not None and self._lost is None:
            self._transport.writelines(held)

    def held_frames(self) -> list[Frame]:
        """Return what was sent since `hold`: a guest that is saved now never hears of it."""
        return FrameDecoder().feed(b"".join(self._held or []))

    async def quiesce(self) -> None:
        """Bring the guest's side of the port to rest, also while it is held.

        Raises SandboxLostError after QUIESCE_TIMEOUT_S.
        """
        quiesced: asyncio.Future[None] = self._loop.create_future()
        self.send(FrameType.QUIESCE, 0, 0, urgent=True)
        self._coming_to_rest.append(quiesced)
        try:
            async with asyncio.timeout(QUIESCE_TIMEOUT_S):
                await quiesced
        except TimeoutError:
            raise SandboxLostError(
                f"bring the guest's port {self.name} to rest",
                f"no answer within {QUIESCE_TIMEOUT_S:.0f} s",
            ) from None

    def resume(self) -> None:
        """Let the guest's side go on after `quiesce` (or after a resume from a template, which is saved at rest)."""
        self.send(FrameType.RESUME, 0, 0, urgent=True)

    def close(self, *, linger_s: float = 0.0) -> None:
        """Close the port; within `linger_s` what was sent still goes out. Idempotent; `on_lost` is not called."""
        self._lost = self._lost or self.make_lost_error("use", "closed")
        self._release_waiters()
        if self._transport is not None and linger_s:
            self._transport.close()
            self._loop.call_later(linger_s, self._transport.abort)
        elif self._transport is not None:
            self._transport.abort()

    def fail(self, reason: str) -> None:
        """End the port because the guest broke the protocol; `on_lost` gets the GuestProtocolError."""
        self.lose(self.make_protocol_error(reason))

    # What its end is called: another peer than a guest speaks the same frames (taskvm.supervisor.ports).

    def make_protocol_error(self, reason: str) -> Exception:
        """Return what a peer that broke the protocol raises."""
        return GuestProtocolError(self.name, reason)

    def make_lost_error(self, attempt: str, reason: str) -> Exception:
        """Return what use of a port whose peer is gone raises; `attempt` is a few words, such as "write to"."""
        return SandboxLostError(f"{attempt} the guest's port {self.name}", reason)

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # sockets have Transports
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        if self._take(data):
            assert self._transport is not None  # it delivered the data
            self._transport.pause_reading()
            self._loop.call_soon(self._take_more)

    def _take(self, data: bytes) -> bool:
        """Hand on the frames in `data`; return whether there may be more than one turn's share of them."""
        try:
            frames = self._decoder.feed(data, FRAMES_PER_TURN)
        except FrameError as error:
            self.fail(str(error))
            return False
        for frame in frames:
            if self._lost is not None:
                return False
            if frame.type is FrameType.QUIESCED:
                self._at_rest()
            else:
                self.on_frame(frame)
        return len(frames) == FRAMES_PER_TURN

    def _take_more(self) -> None:
        if self._lost is not None or self._transport is None:
            return
        if self._take(b""):
            self._loop.call_soon(self._take_more)
        elif self._lost is None:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        def end(words: str) -> None:
            reason = f"the virtual machine ended ({exc or 'end of file'}){words}"
            self.lose(self.make_lost_error("read from", reason))

        if self._lost is None:
            self.explain_end(end)

    def pause_writing(self) -> None:
        self._full = True
        self._writable.clear()

    def resume_writing(self) -> None:
        self._full = False
        if self._held is None:
            self._writable.set()

    def _at_rest(self) -> None:
        if not self._coming_to_rest:
            self.fail("QUIESCED without QUIESCE")
        elif not (quiesced := self._coming_to_rest.popleft()).done():  # else nobody waits any more
            quiesced.set_result(None)

    def lose(self, reason: Exception) -> None:
        """End the port: every use of it fails with `reason`, and `on_lost` is told. Idempotent."""
        if self._lost is not None:
            return
        self._lost = reason
        self._release_waiters()
        if self._transport is not None:
            self._transport.abort()
        self.on_lost(reason)

    def _release_waiters(self) -> None:
        self._writable.set()
        while self._coming_to_rest:
            quiesced = self._coming_to_rest.popleft()
            if not quiesced.done():
                quiesced.set_exception(self._lost or ConnectionError("closed"))
                quiesced.exception()  # retrieved: nobody may be waiting


class Inlet:
    """The receiving end of one flow: bytes from the guest, at most as many as credit was granted for."""

    def __init__(
        self, port: FramePort, stream: int, channel: int, window: int = INITIAL_CREDIT
    ) -> None:
        self._port = port
        self._stream = stream
        self._channel = channel
        self._window = window
        self._credit = window
        self._owed = 0
        self._chunks: deque[bytes | memoryview] = deque()
        self._held = 0
        self._discarding = False
        self._ended = False
        self._error: Exception | None = None
        self._ready = asyncio.Event()

    async def read(self, max_bytes: int = 65536) -> bytes:
        """Return at least one byte and at most `max_bytes`, or b"" at the end.

        Raises StreamReset when the guest reset the stream, SandboxLostError when the sandbox is gone; bytes that
        came before are returned first.
        """
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                return b""
            self._ready.clear()
            await self._ready.wait()
        return self._take(max_bytes)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    def feed(self, payload: bytes | memoryview) -> None:
        """Take the payload of a DATA frame; too much of it, or after END, fails the port."""
        if self._ended or self._error is not None:
            if self._ended:
                self._port.fail(f"DATA after END on stream {self._stream}")
            return
        self._credit -= len(payload)
        if self._credit < 0:
            self._port.fail(f"more DATA than credit on stream {self._stream}")
            return
        if self._discarding:
            self._grant(len(payload))
            return
        # A copy: a view would keep the whole read alive that it was cut from, 256 KiB for a byte of credit.
        self._chunks.append(bytes(payload))
        self._held += len(payload)
        self._ready.set()

    def feed_end(self) -> None:
        """Take an END frame."""
        self._ended = True
        self._ready.set()

    @property
    def credit(self) -> int:
        """How many bytes the guest may still send."""
        return self._credit

    def drain(self, credit: int) -> None:
        """Begin as the flow of a guest that was saved with at most `credit` left to send; all that comes is dropped."""
        self._discarding = True
        self._credit = credit
        # A whole window: of `credit` the guest lacks what was granted while its port was held.
        self._grant(self._window)

    def fail(self, error: Exception) -> None:
        """End the flow with `error`, unless it has ended."""
        if not self._ended and self._error is None:
            self._error = error
        self._ready.set()

    def discard(self) -> None:
        """Drop what is held and all that comes, granting credit for it, so that its sender can end."""
        self._discarding = True
        if self._held:
            self._chunks.clear()
            held, self._held = self._held, 0
            self._grant(held)

    @property
    def ended(self) -> bool:
        """Whether no more bytes will come (some may still wait to be read)."""
        return self._ended or self._error is not None

    def _take(self, max_bytes: int) -> bytes:
        taken: list[bytes | memoryview] = []
        size = 0
        while self._chunks and size < max_bytes:
            chunk = self._chunks[0]
            room = max_bytes - size
            if len(chunk) <= room:
                taken.append(self._chunks.popleft())
                size += len(chunk)
            else:
                taken.append(chunk[:room])
                self._chunks[0] = memoryview(chunk)[room:]
                size += room
        self._held -= size
        self._grant(size)
        return bytes(taken[0]) if len(taken) == 1 else b"".join(taken)

    def _grant(self, size: int) -> None:
        # Credit goes back in lumps of at least half a window: one frame, not hundreds.
        self._owed += size
        if self._ended or self._error is not None or self._owed < self._window // 2:
            return
        self._credit += self._owed
        owed, self._owed = self._owed, 0
        try:
            self._port.send(FrameType.CREDIT, self._channel, self._stream, encode_u32(owed))
        except (SandboxLostError, ConnectionError) as error:
            self.fail(error)


class Outlet:
    """The sending end of one flow: waits for the guest's credit and for room in the port."""

    def __init__(
        self, port: FramePort, stream: int, channel: int, credit: int = INITIAL_CREDIT
    ) -> None:
        self._port = port
        self._stream = stream
        self._channel = channel
        self._credit = credit
        self._ended = False
        self._error: Exception | None = None
        self._ready = asyncio.Event()
        self._lock = asyncio.Lock()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`. Raises StreamReset or SandboxLostError; BrokenPipeError after `end`."""
        view = memoryview(data)
        async with self._lock:
            while view:
                await self._wait_for_room()
                size = min(len(view), self._credit, MAX_DATA)
                self._credit -= size
                self._port.send(FrameType.DATA, self._channel, self._stream, bytes(view[:size]))
                view = view[size:]

    def end(self) -> None:
        """Say that no more bytes come. Idempotent."""
        if not self._ended and self._error is None:
            self._ended = True
            self._port.send(FrameType.END, self._channel, self._stream)

    def reset(self, errno: int, *, urgent: bool = False) -> None:
        """End the whole stream, both directions, telling the guest why; `urgent` as that of FramePort.send."""
        if self._error is None:
            self._error = StreamReset(errno)
            self._ready.set()
            self._port.send(FrameType.RESET, 0, self._stream, encode_u32(errno), urgent=urgent)

    def feed_credit(self, amount: int) -> None:
        """Take a CREDIT frame."""
        if self._credit + amount > MAX_CREDIT:
            self._port.fail(f"credit overflow on stream {self._stream}")
            return
        self._credit += amount
        self._ready.set()

    def fail(self, error: Exception) -> None:
        """End the flow with `error`."""
        self._error = self._error or error
        self._ready.set()

    async def _wait_for_room(self) -> None:
        await self._port.wait_writable()
        while self._credit == 0 and self._error is None and not self._ended:
            self._ready.clear()
            await self._ready.wait()
        if self._error is not None:
            raise self._error
        if self._ended:
            raise BrokenPipeError(32, f"stream {self._stream} was ended for writing")
