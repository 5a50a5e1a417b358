"""A connection of HTTP/2 over a byte stream: one reader, one writer, and streams between them.

Both sides of the gateway use it: `net.http2guest` as the guest's server, `net.http2server` as a
server's client.

Rule 1: the reader never waits for a stream: what a stream has not read is bounded by its window.
Rule 2: streams wait for the peer's windows, and for the writer once MAX_BACKLOG bytes are queued;
        the reader waits for it too, so that answers to pings cannot pile up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import h2.events
import h2.exceptions
from h2.errors import ErrorCodes

from taskvm.net.streams import ByteStream
from taskvm.wire.http2 import CONNECTION_WINDOW, Http2Codec, Http2Error, render_trailer
from taskvm.wire.message import MAX_FIELDS, MAX_HEAD, Header, HttpRefused, trailer_fields

# Bytes of one look, a TLS record: up to 1800 frames, 60 ms of work, then others have their turn.
READ_SIZE = 16 * 1024
MAX_BACKLOG = 256 * 1024  # bytes that wait for the writer
MAX_PIECE = 64 * 1024  # of a body, read or written at once
MAX_HEADS = 16  # informational responses that nobody has read, of MAX_HEAD bytes together
GOAWAY_TIMEOUT_S = 5.0  # to say why a connection is over

AnswerHead: TypeAlias = h2.events.ResponseReceived | h2.events.InformationalResponseReceived

# A frame of this size costs little more than one of 16 KiB, where the peer takes it.
_MAX_FRAME = 64 * 1024


class Http2Stream:
    """One stream: both bodies, heads apart. Its reads and writes raise `error` once there is one."""

    def __init__(self, link: Http2Link, number: int) -> None:
        self.number = number
        self.error: OSError | None = None
        self.heads: deque[AnswerHead] = deque()
        self.trailer: list[Header] = []
        self.sent_end = False
        self.got_end = False
        self.on_fail: Callable[[], object] = lambda: None
        self._link = link
        # One buffer, not a queue: frames of one byte would cost a hundred bytes each.
        self._body = bytearray()
        self._owed = 0  # of the window, padding too
        self._changed = asyncio.Event()

    async def read(self) -> bytes:
        """Return a piece of the body, or b"" at its end."""
        while not self._body:
            if self.got_end:
                return b""
            if self.error is not None:
                raise self.error
            await self.wait_change()
        data = bytes(self._body[:MAX_PIECE])
        del self._body[:MAX_PIECE]
        credit = len(data) if self._body else self._owed
        self._owed -= credit
        self._link.acknowledge(self.number, credit)
        return data

    async def write(self, data: bytes) -> None:
        """Send a piece of the body as the peer's windows allow."""
        view = memoryview(data)
        while view:
            await self._link.wait_room()
            room = self._window()
            if room <= 0:
                await self.wait_change()
                continue
            self._link.send_data(self.number, bytes(view[:room]))
            view = view[room:]

    def write_head(self, fields: list[Header], *, end: bool) -> None:
        """Send a head; `end` says that nothing follows."""
        self._check()
        self.sent_end = end
        self._link.send_headers(self.number, fields, end=end)

    def write_end(self, trailer: list[Header]) -> None:
        """Send the end of the body. Idempotent."""
        if self.sent_end:
            return
        self._check()
        self.sent_end = True
        self._link.send_end(self.number, render_trailer(trailer))

    def release(self, code: ErrorCodes | int) -> None:
        """Forget the stream; what is left of it is reset with `code`. Idempotent."""
        unread, self._owed = self._owed, 0
        self._body.clear()
        self._link.forget(self, code, unread)

    async def wait_room(self) -> None:
        """Wait while too much of this connection waits to be sent."""
        await self._link.wait_room()

    async def wait_change(self) -> None:
        """Wait until the peer has sent something, or has opened a window."""
        self._changed.clear()
        await self._changed.wait()

    # From the link.

    def feed(self, data: bytes, size: int) -> None:
        self._body += data
        self._owed += size
        self._changed.set()

    def feed_head(self, event: AnswerHead) -> None:
        waiting = sum(map(_head_size, self.heads)) + _head_size(event)
        if len(self.heads) >= MAX_HEADS or waiting > MAX_HEAD:
            self.fail(Http2Excess("the response's heads are too long"))
            self.release(ErrorCodes.ENHANCE_YOUR_CALM)
            return
        self.heads.append(event)
        self._changed.set()

    def feed_trailer(self, fields: Sequence[Header]) -> None:
        try:
            self.trailer = trailer_fields(fields)
        except HttpRefused:
            self.fail(Http2Excess("the trailer is too long"))

    def feed_end(self) -> None:
        self.got_end = not isinstance(
            self.error, Http2Excess
        )  # without its trailer it is not whole
        self._changed.set()

    def fail(self, error: OSError) -> None:
        self.error = self.error or error
        self._changed.set()
        self.on_fail()

    def wake(self) -> None:
        self._changed.set()

    def _window(self) -> int:
        self._check()
        return min(self._link.window(self.number), MAX_PIECE)

    def _check(self) -> None:
        if self.error is not None:
            raise self.error


class Http2Reset(ConnectionResetError):  # noqa: N818 - what a peer may do
    """Raised when the peer has reset the stream."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the stream was reset with code {code}")
        self.code = code


class Http2Excess(ConnectionResetError):  # noqa: N818 - what a peer may do
    """Raised when the peer has sent more of heads or trailers than is taken."""


class Http2Link:
    """The connection. `on_request` is called for each new stream of a client; `window` is how much of all
    bodies may be unread. `on_change` is called when the peer has changed how many streams it takes.
    """

    def __init__(
        self,
        stream: ByteStream,
        *,
        on_request: Callable[[Http2Stream, h2.events.RequestReceived], None] | None = None,
        window: int = CONNECTION_WINDOW,
    ) -> None:
        self._stream = stream
        self._on_request = on_request
        self._codec = Http2Codec(client_side=on_request is None, window=window)
        self._h2 = self._codec.h2
        self._streams: dict[int, Http2Stream] = {}
        self._outgoing = bytearray()
        self._to_send = asyncio.Event()
        self._drained = asyncio.Event()
        self._idle = asyncio.timeout(None)
        self._idle_s: float | None = None
        self._busy = False
        self._closed = False
        self.going_away = False
        self.on_change: Callable[[], object] = lambda: None
        self._flush()

    async def run(self, idle_s: float | None = None) -> None:
        """Carry the connection until it ends, or has had no stream for `idle_s`.

        Raises Http2Error when the peer breaks the protocol, OSError when the connection is lost.
        """
        self._idle_s = idle_s
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(self._write())
                failure = await self._read_until_idle()
                await self._say_goodbye(broken=failure is not None)
                writing.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        finally:
            self._close()
        if failure is not None:
            raise failure

    def open_stream(self, fields: list[Header], *, end: bool) -> Http2Stream:
        """Open a stream as a client does, by its head. Raises OSError when there can be none."""
        if self.going_away:
            raise ConnectionResetError("the connection takes no more streams")
        number = 0
        try:
            number = self._h2.get_next_available_stream_id()
            stream = self._streams[number] = Http2Stream(self, number)
            stream.write_head(fields, end=end)
        except (h2.exceptions.TooManyStreamsError, h2.exceptions.NoAvailableStreamIDError) as error:
            self._streams.pop(number, None)
            raise ConnectionResetError("the server takes no more streams") from error
        return stream

    @property
    def max_streams(self) -> int:
        """How many streams the peer lets us have open."""
        return self._h2.remote_settings.max_concurrent_streams

    # Reading.

    async def _read_until_idle(self) -> Http2Error | None:
        """Return what the peer did wrong, if it did."""
        try:
            async with asyncio.timeout(self._idle_s) as self._idle:
                while data := await self._stream.read(READ_SIZE):
                    for event in self._codec.receive(data):
                        self._take(event)
                    self._flush()
                    await self.wait_room()
        except TimeoutError:
            pass
        except Http2Error as error:
            return error
        finally:
            self._close()  # at once: whoever ends meanwhile finds no clock to set
        return None

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self._open(event)
        elif isinstance(event, h2.events.ConnectionTerminated):
            self._go_away(event)
        elif isinstance(event, h2.events.RemoteSettingsChanged) or _opens_all(event):
            self._wake_all()
            self.on_change()
        else:
            self._take_for_stream(event)

    def _take_for_stream(self, event: h2.events.Event) -> None:
        stream = self._streams.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, h2.events.DataReceived):
            if stream is None:
                self.acknowledge(event.stream_id, event.flow_controlled_length)
            elif event.data or event.flow_controlled_length:
                stream.feed(bytes(event.data), event.flow_controlled_length)
        elif stream is None:
            return
        elif isinstance(event, AnswerHead):
            stream.feed_head(event)
        elif isinstance(event, h2.events.TrailersReceived):
            stream.feed_trailer(event.headers)
        elif isinstance(event, h2.events.StreamEnded):
            stream.feed_end()
        elif isinstance(event, h2.events.StreamReset):
            stream.fail(Http2Reset(int(event.error_code)))
        elif isinstance(event, h2.events.WindowUpdated):
            stream.wake()

    def _open(self, event: h2.events.RequestReceived) -> None:
        assert self._on_request is not None, "h2 lets only clients send requests"
        stream = self._streams[event.stream_id] = Http2Stream(self, event.stream_id)
        self._set_idle(None)
        self._on_request(stream, event)

    def _go_away(self, event: h2.events.ConnectionTerminated) -> None:
        self.going_away = True
        for number, stream in self._streams.items():
            if number > (event.last_stream_id or 0):
                stream.fail(Http2Reset(int(ErrorCodes.REFUSED_STREAM)))
        self.on_change()

    def _wake_all(self) -> None:
        for stream in self._streams.values():
            stream.wake()

    # Writing.

    def window(self, number: int) -> int:
        """Return how many bytes of a stream's body may be sent now."""
        limit = min(self._h2.max_outbound_frame_size, _MAX_FRAME)
        return min(self._h2.local_flow_control_window(number), limit)

    def send_headers(self, number: int, fields: list[Header], *, end: bool) -> None:
        self._h2.send_headers(number, fields, end_stream=end)
        self._codec.earn()
        self._flush()

    def send_data(self, number: int, data: bytes) -> None:
        self._h2.send_data(number, data)
        self._codec.earn()
        self._flush()

    def send_end(self, number: int, trailer: list[Header]) -> None:
        if trailer:
            self._h2.send_headers(number, trailer, end_stream=True)
        else:
            self._h2.end_stream(number)
        self._flush()

    def acknowledge(self, number: int, size: int) -> None:
        """Let the peer send `size` more bytes."""
        if size and not self._closed:
            self._h2.acknowledge_received_data(size, number)
            self._flush()

    def forget(self, stream: Http2Stream, code: ErrorCodes | int, unread: int) -> None:
        """Drop a stream, and give back what of it nobody will read."""
        if self._streams.pop(stream.number, None) is None or self._closed:
            return
        over = stream.sent_end and stream.got_end
        if not over and not isinstance(stream.error, Http2Reset):
            # The peer's own reset may have come in the bytes that we are still looking at.
            with contextlib.suppress(h2.exceptions.StreamClosedError):
                self._h2.reset_stream(stream.number, code)
        if not self._streams:
            self._set_idle(self._idle_s)
        self._h2.acknowledge_received_data(unread, stream.number)
        self._flush()

    def _set_idle(self, seconds: float | None) -> None:
        now = asyncio.get_running_loop().time()
        self._idle.reschedule(None if seconds is None else now + seconds)

    async def wait_room(self) -> None:
        """Wait while too much waits for the writer."""
        while len(self._outgoing) > MAX_BACKLOG and not self._closed:
            self._drained.clear()
            await self._drained.wait()

    def _flush(self) -> None:
        if data := self._h2.data_to_send():
            self._outgoing += data
            self._to_send.set()

    async def _write(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            data, self._outgoing = bytes(self._outgoing), bytearray()
            self._busy = True
            await self._stream.write(data)
            self._busy = False
            self._drained.set()

    async def _say_goodbye(self, *, broken: bool) -> None:
        """Send what is queued, a GOAWAY last; a peer that does not read is not waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOAWAY_TIMEOUT_S):
                if not broken:  # else one that says why is queued
                    self._h2.close_connection()
                self._flush()
                while self._outgoing or self._busy:
                    self._drained.clear()
                    await self._drained.wait()

    def _close(self) -> None:
        """Let no stream do anything more."""
        self._closed = self.going_away = True
        self._drained.set()
        for stream in list(self._streams.values()):
            stream.fail(ConnectionResetError("the connection is over"))


def _opens_all(event: h2.events.Event) -> bool:
    return isinstance(event, h2.events.WindowUpdated) and not event.stream_id


def _head_size(event: AnswerHead) -> int:
    if len(event.headers) > MAX_FIELDS:
        return MAX_HEAD + 1  # not to be counted again and again
    return sum(len(name) + len(value) for name, value in event.headers)
