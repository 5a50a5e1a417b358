"""Answers of servers of HTTP/1.1 (taskvm.net.http1server), cut anywhere, ended anywhere, and made of anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.errors import UpstreamError
from taskvm.net.http1server import Http1Server
from taskvm.net.upstream import Upstream
from taskvm.wire.message import Header, Origin, RequestHead, ResponseHead

ORIGIN = Origin("http", "api.test", 80)

CHUNKED = (
    b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
    b"X-One: 1\r\n\r\n5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n"
)
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nX-One: 1\r\n\r\nhello world"
TO_THE_END = b"HTTP/1.1 200 OK\r\nX-One: 1\r\n\r\nhello world"


class Pieces:
    """A server's connection: these pieces, then its end."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.sent = b""

    async def read(self, max_bytes: int = 65536) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    async def write(self, data: bytes) -> None:
        self.sent += data

    async def end(self) -> None:
        pass

    def abort(self) -> None:
        pass


async def receive(*pieces: bytes) -> tuple[list[int], ResponseHead, bytes, list[Header], bool]:
    """Return the statuses, the final head, the body, the trailer, and whether the connection can be used again."""
    stream = Pieces(*pieces)
    reusable: list[bool] = []
    server = Http1Server(Upstream(stream, stream, "192.0.2.1", "public"), ORIGIN)  # type: ignore[arg-type]  # no socket
    exchange = server.exchange(lambda server, reuse: reusable.append(reuse))
    await exchange.send_head(RequestHead(b"GET", b"/", []))
    statuses = []
    while (head := await exchange.read_head()).status < 200:
        statuses.append(head.status)
    body = b""
    while data := await exchange.read():
        body += data
    exchange.release(complete=True)
    return [*statuses, head.status], head, body, exchange.trailer, reusable == [True]


@pytest.mark.parametrize("whole", [CHUNKED, LENGTH, TO_THE_END])
async def test_an_answer_cut_anywhere_means_the_same(whole: bytes) -> None:
    expected = await receive(whole)

    assert expected[2] == b"hello world"
    assert expected[4] is (whole is not TO_THE_END)
    for cut in range(1, len(whole)):
        assert await receive(whole[:cut], whole[cut:]) == expected
    assert await receive(*(whole[at : at + 1] for at in range(len(whole)))) == expected


@pytest.mark.parametrize("whole", [CHUNKED, LENGTH])
async def test_an_answer_that_ends_anywhere_never_looks_complete(whole: bytes) -> None:
    for end in range(len(whole)):
        with pytest.raises(UpstreamError):
            await receive(whole[:end])


@pytest.mark.parametrize("pieces", [[LENGTH + LENGTH], [LENGTH + b"x"], [CHUNKED + LENGTH]])
async def test_a_connection_on_which_more_came_is_not_used_again(pieces: list[bytes]) -> None:
    """A second answer would be taken for that of the next request."""
    _, _, body, _, reusable = await receive(*pieces)

    assert (body, reusable) == (b"hello world", False)


@given(st.binary(max_size=200), st.integers(0, len(CHUNKED)), st.integers(0, 40))
async def test_anything_is_an_answer_or_the_servers_error(
    noise: bytes, at: int, length: int
) -> None:
    changed = CHUNKED[:at] + noise + CHUNKED[at + length :]
    try:
        statuses, _, _, trailer, _ = await receive(changed)
    except UpstreamError:
        return
    assert 200 <= statuses[-1] <= 999
    assert all(name.lower() != b"content-length" for name, _ in trailer)
