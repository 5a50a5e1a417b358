"""Attacks by odd spellings: hosts, targets, framing and fields that two programs could read differently.

Judged from what reached the canary server, byte by byte, and from the audit log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from tests.support.egress_lab import GuestSocket, Lab, dns_query, egress_lab
from tests.support.h2_lab import fields, h2_client
from tests.support.tcp import tcp_server
from tests.support.waiting import PATIENCE_S

from taskvm.egress.policy import Policy
from taskvm.errors import UsageError
from taskvm.port import StreamReset

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Wire:
    """A server that writes down the bytes that reach it, and answers each head."""

    port: int = 0
    received: list[bytes] = field(default_factory=list)
    answer: bytes = OK

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.received.append(b"")
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.received[-1] += data
                if self.received[-1].endswith(b"\r\n\r\n"):
                    writer.write(self.answer)


@asynccontextmanager
async def wire(answer: bytes = OK) -> AsyncIterator[Wire]:
    seen = Wire(answer=answer)
    async with tcp_server(seen.serve) as seen.port:
        yield seen


@asynccontextmanager
async def lab_for(seen: Wire) -> AsyncIterator[Lab]:
    names = ("api.test", "other.test")
    async with egress_lab(
        allow=names,
        allow_addresses=[f"127.0.0.1:{seen.port}"],
        hosts={name: ["127.0.0.1"] for name in (*names, "evil.test")},
    ) as lab:
        yield lab


async def everything(sock: GuestSocket) -> bytes:
    """Return what comes until the end or the reset of the connection."""
    received = b""
    with contextlib.suppress(StreamReset):
        async with asyncio.timeout(PATIENCE_S):
            while data := await sock.read():
                received += data
    return received


async def tell(lab: Lab, port: int, data: bytes) -> bytes:
    """Send bytes on a connection to api.test, end, and return the answer."""
    sock = await lab.connect("api.test", port)
    with contextlib.suppress(StreamReset):
        await sock.write(data)
        sock.end()
    return await everything(sock)


# Names of one host.


@pytest.mark.parametrize(
    "host",
    ["api.test.", "API.TEST", "Api.Test."],
)
async def test_another_spelling_of_the_host_is_sent_in_its_one_form(host: str) -> None:
    """A server that tells names apart by their bytes sees the name that was judged."""
    async with wire() as seen, lab_for(seen) as lab:
        answer = await tell(
            lab, seen.port, b"GET / HTTP/1.1\r\nHost: %s:%d\r\n\r\n" % (host.encode(), seen.port)
        )

    assert answer.startswith(b"HTTP/1.1 200")
    assert [b"Host: api.test:%d\r\n" % seen.port in each for each in seen.received] == [True]


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0",
        "0.0.0.0",
        "[::]",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[fe80::1%25eth0]",
        "[fe80::1%eth0]",
        "localhost",
        "api.test:0",
        "api.test:+{port}",
        "api.test: {port}",
        "api.test:{port}\x0b",
        "api.test:0{port}x",
        "api.test:99999",
        "api.test:{port}/",
        "api.test:{port}?",
        "api.test:{port}#",
        "api.test\\:{port}",
        "xn--pi-7kc.test:{port}",
        "%61pi.test:{port}",
        "api\u3002test:{port}",
        "\u00e4pi.test:{port}",
        "api.test,:{port}",
        "api.test..:{port}",
        ".api.test:{port}",
        "*.test:{port}",
        "api.test:{port} evil.test",
        "a" * 300,
    ],
)
async def test_no_other_spelling_names_the_host(host: str) -> None:
    async with wire() as seen, lab_for(seen) as lab:
        named = host.format(port=seen.port).encode()
        answer = await tell(lab, seen.port, b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % named)

        assert lab.denials("request")
    assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 403")
    assert seen.received == []


@pytest.mark.parametrize(
    "name",
    [
        "2130706433",
        "0x7f.1",
        "127.1",
        "0177.0.0.1",
        "127.0.0.1",
        "api.test.evil.test",
        "xn--pi-7kc.test",
    ],
)
async def test_no_number_is_a_name(name: str) -> None:
    """Of what libc and browsers take for addresses, nothing has a record, and nothing is looked up."""
    async with wire() as seen, lab_for(seen) as lab:
        rcode, address = await lab.guest.resolve(name)

    assert rcode != 0
    assert address is None
    assert lab.resolver.asked == []


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f.1",
        "127.1",
        "[fe80::1%eth0]",
        "fe80::1%eth0",
        "api.test:0",
        "*",
        "*.test",
        "api\u3002test",
    ],
)
def test_a_policy_has_no_such_host(host: str) -> None:
    with pytest.raises(UsageError):
        Policy.parse([host])


@pytest.mark.parametrize(
    "addresses",
    [
        ["0.0.0.0"],
        ["::"],
        ["::ffff:127.0.0.1"],
        ["::ffff:169.254.169.254"],
        ["64:ff9b::7f00:1"],
        ["fe80::1"],
        ["127.0.0.2"],
    ],
)
async def test_a_name_that_leads_inside_leads_nowhere(addresses: list[str]) -> None:
    """The canary listens on 127.0.0.1, and only that address is let in."""
    async with (
        wire() as seen,
        egress_lab(
            allow=["api.test"],
            allow_addresses=[f"127.0.0.1:{seen.port}"],
            hosts={"api.test": addresses},
        ) as lab,
    ):
        answer = await tell(
            lab, seen.port, b"GET / HTTP/1.1\r\nHost: api.test:%d\r\n\r\n" % seen.port
        )

        assert b"403" in answer.split(b"\r\n")[0]
        assert lab.denials("connect")
    assert seen.received == []


# One message.


CHUNKED = b"POST / HTTP/1.1\r\nHost: api.test:%d\r\nTransfer-Encoding: chunked\r\n\r\n"
INNER = b"GET /smuggled HTTP/1.1\r\nHost: other.test\r\n\r\n"


@pytest.mark.parametrize(
    "body",
    [
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b" 5\r\nhello\r\n0\r\n\r\n",
        b"-1\r\n0\r\n\r\n",
        b"5\rhello\r\n0\r\n\r\n",
        b"5\r\nhelloXX0\r\n\r\n" + INNER,
        b"5\r\nhello\r\r0\r\n\r\n" + INNER,
        b"fffffffffffffffff\r\nhello",
        b"ffffffffffffffffffffff\r\nhello",
        b"\r\n5\r\nhello\r\n0\r\n\r\n",
        b"0\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    ],
)
async def test_a_body_that_is_cut_oddly_is_never_complete(body: bytes) -> None:
    async with wire() as seen, lab_for(seen) as lab:
        await tell(lab, seen.port, CHUNKED % seen.port + body)

    assert all(b"0\r\n\r\n" not in each.partition(b"\r\n\r\n")[2] for each in seen.received)
    assert b"smuggled" not in b"".join(seen.received)


@pytest.mark.parametrize(
    "body",
    [
        b"5;a=b\r\nhello\r\n0\r\n\r\n",
        b'5;a="0\\r\\n\\r\\n"\r\nhello\r\n0;z\r\n\r\n',
        b"00005\r\nhello\r\n000\r\n\r\n",
        b"5\nhello\r\n0\r\n\r\n",
        b"5;" + b"x" * 70_000 + b"\r\nhello\r\n0\r\n\r\n",
    ],
)
async def test_a_body_arrives_in_our_own_framing(body: bytes) -> None:
    """Extensions, zeros and bare line feeds end here, if the message is taken at all."""
    async with wire() as seen, lab_for(seen) as lab:
        await tell(lab, seen.port, CHUNKED % seen.port + body)

    bodies = [each.partition(b"\r\n\r\n")[2] for each in seen.received]
    assert all(each in (b"5\r\nhello\r\n0\r\n\r\n", b"") for each in bodies)


@pytest.mark.parametrize(
    "head",
    [
        "GET / HTTP/1.1\nHost: api.test:{port}\n\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nX: a\r\n b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nX: a\r\n\tContent-Length: 50\r\n\r\n",
        "GET / HTTP/1.1\r\nX: a\r\n Host: evil.test\r\nHost: api.test:{port}\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\nX: y\r\n\r\n",
        "GET  / HTTP/1.1\r\nHost: api.test:{port}\r\n\r\n",
        "GET\t/ HTTP/1.1\r\nHost: api.test:{port}\r\n\r\n",
        "GET / HTTP/1.1 \r\nHost: api.test:{port}\r\n\r\n",
        "GET / HTTP/1.1\r\n Host: api.test:{port}\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : api.test:{port}\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nX Y: z\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\n: z\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nX\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nX: a\rY: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nContent-Length: 00\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nContent-Length:\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nContent-Length: 1_0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nTransfer-Encoding:\x0bchunked\r\n\r\n",
        'GET / HTTP/1.1\r\nHost: api.test:{port}\r\nTransfer-Encoding: "chunked"\r\n\r\n',
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nTransfer-Encoding: chunked;x=y\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nTransfer-Encoding: identity\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test:{port}\r\nConnection: host, content-length, transfer-encoding\r\n\r\n",
        "\r\nGET / HTTP/1.1\r\nHost: api.test:{port}\r\n\r\n",
        "GET / HTTP/0.9\r\nHost: api.test:{port}\r\n\r\n",
        "GET /\r\nHost: api.test:{port}\r\n\r\n",
    ],
)
async def test_a_head_arrives_once_in_our_own_form_or_not_at_all(head: str) -> None:
    """Whatever is lenient on our side: the server sees one request line, one Host, and no folded line."""
    async with wire() as seen, lab_for(seen) as lab:
        text = head.format(port=seen.port).encode("latin-1")
        await tell(lab, seen.port, text + INNER)

    for received in seen.received:
        lines = received.split(b"\r\n")
        assert lines[0] == b"GET / HTTP/1.1"
        assert lines[1] == b"Host: api.test:%d" % seen.port
        assert sum(line.lower().startswith(b"host") for line in lines) == 1
        assert b"smuggled" not in received
        assert not any(line.startswith((b" ", b"\t")) for line in lines)
        assert b"\n" not in b"".join(lines)
        assert b"\r" not in b"".join(lines)
        assert not any(
            line.lower().startswith((b"content-length: 5", b"transfer-encoding")) for line in lines
        )


# Answers.


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX: a\r\n Y: b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\nX: a\nContent-Length: 2\n\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad",
        b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nbad\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\nContent-Length: 3\r\n\r\nbad" + OK,
        b"HTTP/1.1 200 OK\r\nX\x00: a\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 a\rb\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 999 odd\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 099 odd\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_a_server_cannot_split_its_answer(answer: bytes) -> None:
    """The guest gets one final answer to one request, and the next one goes to a connection without leftovers."""
    async with wire(answer) as seen, lab_for(seen) as lab:
        sock = await lab.connect("api.test", seen.port)
        await sock.write(
            b"GET / HTTP/1.1\r\nHost: api.test:%d\r\nConnection: close\r\n\r\n" % seen.port
        )
        received = await everything(sock)

        assert lab.failure is None
    finals = [
        line
        for line in received.split(b"\r\n")
        if line.startswith(b"HTTP/1.1 ") and not line.startswith(b"HTTP/1.1 1")
    ]
    assert len(finals) <= 1
    assert b"bad" not in received
    assert b"\rSet-Cookie" not in received


# The record.


@pytest.mark.parametrize(
    "target",
    [
        "/\x1b]0;x\x07",
        "/%0a%22%7d%0a",
        '/"},{"decision":"allow"',
        "/" + "x" * 50_000,
        "/\u202e",
        "/\x85\x9b31m",
        "/\xff\xfe",
    ],
)
async def test_a_guests_text_stays_one_printable_line(target: str) -> None:
    async with wire() as seen, lab_for(seen) as lab:
        line = f"GET {target} HTTP/1.1\r\nHost: evil.test\r\n\r\n".encode(
            "utf-8", "surrogateescape"
        )
        await tell(lab, seen.port, line)

        events = [json.loads(line) for line in lab.lines]
        assert all(line.count(b"\n") == 1 and len(line) < 8192 for line in lab.lines)
        assert all(0x20 <= sign < 0x7F or sign == 0x0A for sign in b"".join(lab.lines))
        assert [event["decision"] for event in events if event["kind"] == "request"] == ["deny"]
    assert seen.received == []


async def test_names_that_are_asked_for_stay_one_printable_line() -> None:
    """Labels may be any bytes (RFC 2181 section 11)."""
    async with wire() as seen, lab_for(seen) as lab:
        for label in (b"a\n{}", b"\x1b[2J", b"\xff\xfe", b'"', b"\0", b"x" * 63):
            query = bytearray(dns_query("P.evil.test"))
            query[12:14] = bytes([len(label)]) + label
            await lab.guest.query(bytes(query))

        assert all(line.count(b"\n") == 1 for line in lab.lines)
        assert all(0x20 <= sign < 0x7F or sign == 0x0A for sign in b"".join(lab.lines))
        assert all(json.loads(line)["decision"] == "deny" for line in lab.lines)
    assert lab.resolver.asked == []


# HTTP/2.


METHOD, SCHEME, PATH = (":method", "GET"), (":scheme", "https"), (":path", "/")
AUTHORITY = (":authority", "api.test:{port}")
WHOLE = [METHOD, SCHEME, PATH, AUTHORITY]


@pytest.mark.parametrize(
    "head",
    [
        [(":method", "CONNECT"), AUTHORITY],
        [(":method", "CONNECT"), (":protocol", "websocket"), *WHOLE[1:]],
        [*WHOLE, AUTHORITY],
        [*WHOLE, (":path", "/")],
        [*WHOLE, ("te", "gzip")],
        [*WHOLE, ("proxy-connection", "x")],
        [*WHOLE, ("X-Upper", "x")],
        [*WHOLE, ("x y", "x")],
        [*WHOLE, ("x", " padded ")],
        [(":status", "200"), *WHOLE],
        [METHOD, SCHEME, (":path", ""), AUTHORITY],
        [METHOD, SCHEME, (":path", "*"), AUTHORITY],
        [METHOD, SCHEME, (":path", "//evil.test/ HTTP/1.1"), AUTHORITY],
        [METHOD, (":scheme", "ftp"), PATH, AUTHORITY],
        [(":method", "get"), (":scheme", "http"), PATH, AUTHORITY],
        [METHOD, PATH, AUTHORITY],
        [METHOD, SCHEME, PATH],
        [METHOD, SCHEME, PATH, (":authority", "")],
    ],
)
async def test_a_head_of_http2_that_is_none_reaches_no_server(head: list[tuple[str, str]]) -> None:
    """It is refused on its stream, or costs the connection."""
    async with wire() as seen, lab_for(seen) as lab:
        frank = {"validate_outbound_headers": False, "normalize_outbound_headers": False}
        async with h2_client(lab, "api.test", seen.port, **frank) as client:
            number = await client.send([(name, text.format(port=seen.port)) for name, text in head])
            (answer,) = await client.finish(number)

        assert client.closed or answer.status in (400, 403, 501)
        assert lab.denials("request")
        assert lab.failure is None
    assert seen.received == []


@pytest.mark.parametrize(
    "frames",
    [
        b"\0\0\x04\x08\0\0\0\0\0\x7f\xff\xff\xff",  # WINDOW_UPDATE beyond 2^31 - 1
        b"\0\0\x04\x08\0\0\0\0\0\0\0\0\0",  # of nothing
        b"\0\0\x06\x04\0\0\0\0\0\0\x04\xff\xff\xff\xff",  # SETTINGS: a window of 2^32 - 1
        b"\0\0\x06\x04\0\0\0\0\0\0\x05\0\0\0\x01",  # frames of one byte
        b"\0\0\x05\x04\0\0\0\0\0\0\x05\0\0\0",  # five bytes
        b"\0\0\x06\x04\0\0\0\0\x01\0\x03\0\0\0\x01",  # on a stream
        b"\0\0\x01\x04\x01\0\0\0\0x",  # an acknowledgement with a payload
        b"\0\0\0\0\0\0\0\0\0",  # DATA on no stream
        b"\0\0\0\x01\x04\0\0\0\x02",  # a request on a stream of the server's
        b"\0\0\x05\x02\0\0\0\0\x03\0\0\0\x03\0",  # a stream that depends on itself
        b"\0\0\x04\x03\0\0\0\0\x05\0\0\0\0",  # a reset of a stream that never was
        b"\0\0\x04\x05\x04\0\0\0\x01\0\0\0\x02",  # PUSH_PROMISE from a client
    ],
)
async def test_a_frame_that_is_none_costs_its_connection_and_nothing_else(frames: bytes) -> None:
    async with wire() as seen, lab_for(seen) as lab:
        async with h2_client(lab, "api.test", seen.port) as client:
            await client.flush()
            await client.stream.write(frames)
            await client.read_to_end()
        answer = await tell(lab, seen.port, b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n")

        assert lab.failure is None
    assert answer.startswith(b"HTTP/1.1 403")
    assert seen.received == []


async def test_a_huge_table_is_not_taken_up() -> None:
    """SETTINGS_HEADER_TABLE_SIZE of 2^32 - 1: our fields are never indexed, and the connection goes on."""
    async with wire() as seen, lab_for(seen) as lab:
        async with h2_client(lab, "api.test", seen.port) as client:
            await client.flush()
            await client.stream.write(b"\0\0\x06\x04\0\0\0\0\0\0\x01\xff\xff\xff\xff")
            answer = await client.ask(fields("evil.test"))

        assert answer.status == 403
    assert seen.received == []
