"""Attacks on secrets beyond headers: queries, paths, bodies, and servers that repeat what they got.

Judged from what reached the servers and from the record; the value is searched for in all that the guest sees.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, quote

import pytest
from tests.support.egress_lab import (
    HttpServer,
    Lab,
    egress_lab,
    http_server,
    read_all,
    scripted_server,
)

from taskvm.egress.secret import Place, Secret
from taskvm.errors import UsageError

VALUE = 'sk/live+"0123&456=789'
QUOTED = quote(VALUE, safe="")


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with http_server("api.test", "other.test") as server:
        yield server


@asynccontextmanager
async def lab_for(
    port: int, places: Sequence[Place] = (), hosts: Sequence[str] = ("api.test",)
) -> AsyncIterator[Lab]:
    async with egress_lab(
        allow=["api.test", "other.test"],
        allow_addresses=[f"127.0.0.1:{port}"],
        hosts={"api.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]},
        secrets=[Secret("KEY", VALUE, hosts=hosts, places=places)],
    ) as lab:
        yield lab
        for text in (VALUE, QUOTED, json.dumps(VALUE)[1:-1]):
            assert text.encode() not in b"".join(lab.lines)


async def send(
    lab: Lab, server: HttpServer, line: str, *headers: str, body: Sequence[bytes] = (), host: str = "api.test"
) -> bytes:  # fmt: skip
    """Send one HTTPS request; {p} in it is the placeholder. A body is sent in these pieces."""
    address = await lab.address_of(host)
    lines = [line, f"Host: {host}:{server.port}", "Connection: close", *headers, "", ""]
    text = "\r\n".join(lines).replace("{p}", lab.secrets[0].placeholder)
    async with lab.tls(address, server.port, host) as stream:
        await stream.write(text.encode())
        with contextlib.suppress(OSError):
            for piece in body:
                await stream.write(piece)
                await asyncio.sleep(0.005)
        return await read_all(stream)


def chunked(*pieces: bytes) -> list[bytes]:
    return [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]


def arrived_whole(server: HttpServer, text: bytes) -> bool:
    """Say whether a body came to its end, or `text` came at all: the head is there before the body is read."""
    return any(
        text in seen.body or len(seen.body) >= int(seen.header("Content-Length") or 0)
        for seen in server.requests
    )


# Where a value may stand.


async def test_a_value_stands_in_the_query_and_the_path_where_that_is_said(
    server: HttpServer,
) -> None:
    async with lab_for(server.port, ["query", "path"]) as lab:
        answer = await send(lab, server, "GET /bot{p}/send?a=1&key={p}&b=%7B HTTP/1.1")

        request = next(event for event in lab.events if event.kind == "request")
        assert (request.path, request.secrets) == ("/bot{KEY}/send", ("KEY",))
    assert server.requests[0].path == f"/bot{quote(VALUE, safe='+&=')}/send?a=1&key={QUOTED}&b=%7B"
    assert VALUE.encode() not in answer


@pytest.mark.parametrize(
    ("places", "line", "host"),
    [
        (["query"], "GET /{p} HTTP/1.1", "api.test"),
        (["path"], "GET /?{p} HTTP/1.1", "api.test"),
        (["query", "path"], "GET /{p}?{p} HTTP/1.1", "other.test"),
        (["query"], "GET /?a=%74{p} HTTP/1.1", "other.test"),
        (["body"], "GET /?a={p} HTTP/1.1", "api.test"),
    ],
)
async def test_another_place_or_host_stops_the_request(
    server: HttpServer, places: list[Place], line: str, host: str
) -> None:
    async with lab_for(server.port, places) as lab:
        answer = await send(lab, server, line, host=host)

        assert b" 403 " in answer
        assert lab.denials("secret")
    assert server.connections == 0


async def test_another_spelling_of_a_placeholder_is_no_placeholder(server: HttpServer) -> None:
    async with lab_for(server.port, ["query", "path"]) as lab:
        placeholder = lab.secrets[0].placeholder
        spelled = f"%{ord(placeholder[0]):02x}{placeholder[1:]}"
        answer = await send(lab, server, f"GET /?a={spelled} HTTP/1.1")

        assert b" 403 " in answer
    assert server.connections == 0


@pytest.mark.parametrize("cut", [1, 20, 60])
async def test_a_value_stands_in_a_body_however_it_is_cut(server: HttpServer, cut: int) -> None:
    async with lab_for(server.port, ["body"]) as lab:
        body = f"before {lab.secrets[0].placeholder} after".encode()
        length = f"Content-Length: {len(body)}"
        pieces = [body[:cut], body[cut:]]
        await send(lab, server, "POST / HTTP/1.1", length, body=pieces)
        await send(
            lab, server, "POST / HTTP/1.1", "Transfer-Encoding: chunked", body=chunked(*pieces)
        )

        assert [event.secrets for event in lab.events if event.kind == "secret"][:2] == [
            ("KEY",)
        ] * 2
    assert [seen.body for seen in server.requests] == [f"before {VALUE} after".encode()] * 2


async def test_a_value_is_written_as_its_body_is(server: HttpServer) -> None:
    async with lab_for(server.port, ["body"]) as lab:
        placeholder = lab.secrets[0].placeholder
        bodies = {
            "application/json": json.dumps({"key": placeholder}).encode(),
            "application/x-www-form-urlencoded; charset=utf-8": f"key={placeholder}&b=1".encode(),
        }
        for kind, body in bodies.items():
            headers = [f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
            await send(lab, server, "POST / HTTP/1.1", *headers, body=[body])

    assert json.loads(server.requests[0].body) == {"key": VALUE}
    assert parse_qs(server.requests[1].body.decode()) == {"key": [VALUE], "b": ["1"]}


async def test_a_body_for_another_host_is_broken_off(server: HttpServer) -> None:
    async with lab_for(server.port, ["body"]) as lab:
        body = b"x" * 100 + lab.secrets[0].placeholder.encode()
        length = f"Content-Length: {len(body)}"
        await send(lab, server, "POST / HTTP/1.1", length, body=[body], host="other.test")

        assert [event.secrets for event in lab.denials("secret")] == [("KEY",)]
        assert not arrived_whole(server, b"taskvm_secret")


@pytest.mark.parametrize("cut", [3, 12])
async def test_a_value_that_comes_in_a_body_does_not_leave(server: HttpServer, cut: int) -> None:
    """The guest knows it from elsewhere; whatever the secret's places are."""
    async with lab_for(server.port) as lab:
        body = f"leak: {VALUE}".encode()
        length = f"Content-Length: {len(body)}"
        pieces = [body[: 6 + cut], body[6 + cut :]]
        await send(lab, server, "POST / HTTP/1.1", length, body=pieces, host="other.test")

        assert [event.secrets for event in lab.denials("secret")] == [("KEY",)]
        assert not arrived_whole(server, b"sk/")


async def test_a_body_without_secrets_keeps_its_length(server: HttpServer) -> None:
    async with lab_for(server.port) as lab:
        body = b"sk/" * 1000
        await send(lab, server, "POST / HTTP/1.1", f"Content-Length: {len(body)}", body=[body])

    assert server.requests[0].body == body
    assert server.requests[0].header("Content-Length") == str(len(body))


# What servers repeat.


async def ask_in_clear(lab: Lab, port: int, *headers: str) -> bytes:
    sock = await lab.connect("api.test", port)
    lines = ["GET / HTTP/1.1", f"Host: api.test:{port}", "Connection: close", *headers, "", ""]
    return await sock.exchange("\r\n".join(lines).encode())


@pytest.mark.parametrize(
    "body",
    [
        VALUE,
        f"token={QUOTED}",
        json.dumps({"headers": {"Authorization": f"Bearer {VALUE}"}}),
        json.dumps(VALUE).replace("/", "\\/"),
        f"<b>{VALUE.replace('&', '&amp;').replace(chr(34), '&quot;')}</b>",
    ],
)
@pytest.mark.parametrize("chunks", [False, True])
async def test_a_repeated_value_comes_back_as_the_placeholder(body: str, chunks: bool) -> None:
    data = body.encode()
    head = b"HTTP/1.1 200 OK\r\nX-Echo: %s\r\nContent-Type: text/html\r\n" % QUOTED.encode()
    if chunks:
        framed = b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(
            chunked(*(data[at : at + 7] for at in range(0, len(data), 7)))
        )
    else:
        framed = b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
    async with (
        scripted_server(head + framed) as repeating,
        lab_for(repeating.port, hosts=[f"api.test:{repeating.port}"]) as lab,
    ):
        placeholder = lab.secrets[0].placeholder
        answer = await ask_in_clear(lab, repeating.port, f"Authorization: {placeholder}")

        assert answer.count(placeholder.encode()) == 2
        others = answer.replace(placeholder.encode(), b"")  # it has random digits
        for text in (VALUE, QUOTED, "0123"):
            assert text.encode() not in others
        assert [(e.rule, e.secrets) for e in lab.denials("secret")] == [("reflection", ("KEY",))]
        assert b"accept-encoding: identity" in repeating.requests[0].body.lower()


async def test_a_host_that_knows_a_value_is_asked_for_no_part_of_it_and_no_other_form(
    server: HttpServer,
) -> None:
    """It may have stored what another request brought: a later one asks for half of it, or for it compressed."""
    parts = [
        "Range: bytes=0-9", 'If-Range: "x"', "Accept-Encoding: gzip", "accept-encoding: br",
        "A-IM: gzip", "Accept-Charset: utf-16",
    ]  # fmt: skip
    async with lab_for(server.port) as lab:
        for host in ("api.test", "other.test"):
            await send(lab, server, "GET /stored HTTP/1.1", *parts, host=host)

    (asked, other) = server.requests
    names = ("Range", "If-Range", "Accept-Encoding", "A-IM", "Accept-Charset")
    assert [asked.header(name) for name in names] == [None, None, "identity", None, None]
    assert [other.header(name) for name in names] == ["bytes=0-9", '"x"', "gzip", "gzip", "utf-16"]


async def test_repeated_basic_credentials_come_back_as_they_were_sent() -> None:
    real = base64.b64encode(f"user:{VALUE}".encode())
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(real)
    async with (
        scripted_server(head + real) as repeating,
        lab_for(repeating.port, hosts=[f"api.test:{repeating.port}"]) as lab,
    ):
        sent = base64.b64encode(f"user:{lab.secrets[0].placeholder}".encode()).decode()
        answer = await ask_in_clear(lab, repeating.port, f"Authorization: Basic {sent}")

        assert real not in answer
        assert sent.encode() in answer


async def test_no_part_of_a_response_shows_the_value() -> None:
    """Informational heads, the reason, names of headers, trailers: a server can repeat it anywhere."""
    value = "sk-live-0123456789"
    answer = (
        f"HTTP/1.1 103 Early Hints\r\nLink: {value}\r\n\r\nHTTP/1.1 200 {value}\r\n"
        f"X-{value}: 1\r\nContent-Type: text/plain\r\n"
        f"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: {value}\r\n\r\n"
    )
    async with scripted_server(answer.encode()) as repeating:
        host = f"api.test:{repeating.port}"
        async with egress_lab(
            allow=["api.test"], allow_addresses=[f"127.0.0.1:{repeating.port}"],
            hosts={"api.test": ["127.0.0.1"]}, secrets=[Secret("KEY", value, hosts=[host])],
        ) as lab:  # fmt: skip
            placeholder = lab.secrets[0].placeholder
            shown = await ask_in_clear(lab, repeating.port, f"Authorization: {placeholder}")

    assert b"103" in shown
    assert b"X-Trailer" in shown
    assert value.encode() not in shown
    assert shown.count(placeholder.encode()) == 4


async def test_a_large_stream_passes_unchanged(server: HttpServer) -> None:
    body = bytes(range(256)) * 4000
    async with lab_for(server.port) as lab:
        answer = await send(
            lab, server, "POST / HTTP/1.1", f"Content-Length: {len(body)}", body=[body]
        )

    assert server.requests[0].body == body
    assert answer.count(b"\xfd\xfe\xff\x00") >= 3900


# Changing secrets while they are used.


async def test_a_rotated_secret_has_its_new_value_and_the_old_one_does_not_travel(
    server: HttpServer,
) -> None:
    async with lab_for(server.port) as lab:
        placeholder = lab.secrets[0].placeholder
        again = lab.gateway.keyring.put(
            lab.policy, Secret("KEY", "new-value-1", hosts=["api.test"])
        )
        await send(lab, server, "GET / HTTP/1.1", "Authorization: {p}")
        answer = await send(lab, server, "GET / HTTP/1.1", f"X-Any: {VALUE}")

        assert again == placeholder
        assert b" 403 " in answer
    assert [seen.header("Authorization") for seen in server.requests] == ["new-value-1"]


async def test_a_revoked_secret_goes_nowhere(server: HttpServer) -> None:
    async with lab_for(server.port, ["body"]) as lab:
        lab.gateway.keyring.revoke("KEY")
        body = lab.secrets[0].placeholder.encode()
        answers = [
            await send(lab, server, "GET / HTTP/1.1", "Authorization: {p}"),
            await send(lab, server, "GET / HTTP/1.1", f"X-Any: {VALUE}"),
        ]
        await send(lab, server, "POST / HTTP/1.1", f"Content-Length: {len(body)}", body=[body])

        assert all(b" 403 " in answer for answer in answers)
        assert lab.gateway.keyring.placeholders == {}
        assert not arrived_whole(server, b"taskvm_secret")
        with pytest.raises(UsageError, match="no secret"):
            lab.gateway.keyring.revoke("OTHER")


async def test_a_secret_that_is_added_works_at_once(server: HttpServer) -> None:
    async with lab_for(server.port) as lab:
        added = lab.gateway.keyring.put(
            lab.policy, Secret("MORE", "more-value", hosts=["api.test"])
        )
        await send(lab, server, "GET / HTTP/1.1", f"Authorization: {added}")
        with pytest.raises(UsageError, match="not within the allowed hosts"):
            lab.gateway.keyring.put(lab.policy, Secret("BAD", "x", hosts=["evil.test"]))

    assert server.requests[0].header("Authorization") == "more-value"


async def test_a_source_is_asked_again_when_its_value_is_old(server: HttpServer) -> None:
    values = iter(["first-value", "second-value"])
    async with lab_for(server.port) as lab:
        secret = Secret.from_callback(
            "T", lambda: next(values), hosts=["api.test"], refresh_s=0.001
        )
        placeholder = lab.gateway.keyring.put(lab.policy, secret)
        await asyncio.sleep(0.01)
        await send(lab, server, "GET / HTTP/1.1", f"Authorization: {placeholder}")
        answer = await send(lab, server, "GET / HTTP/1.1", f"Authorization: {placeholder}")
        await send(lab, server, "GET /plain HTTP/1.1")

        assert b" 403 " in answer  # the source has ended: nothing old is sent
        assert "gave no value" in lab.denials("secret")[0].reason
    sent = [(seen.path, seen.header("Authorization")) for seen in server.requests]
    assert sent == [("/", "second-value"), ("/plain", None)]


async def test_a_source_is_asked_again_before_a_body_that_may_have_its_value(
    server: HttpServer,
) -> None:
    values = iter(["first-value", "second-value"])
    async with lab_for(server.port) as lab:
        secret = Secret.from_callback(
            "T", lambda: next(values), hosts=["api.test"], refresh_s=0.001, places=["body"]
        )
        placeholder = lab.gateway.keyring.put(lab.policy, secret).encode()
        bodies = [placeholder, placeholder, b"plain"]
        await asyncio.sleep(0.01)
        for body in bodies:
            length = f"Content-Length: {len(body)}"
            await send(lab, server, "POST / HTTP/1.1", length, body=[body])

        assert ["gave no value" in e.reason for e in lab.denials("secret") if not e.rule] == [True]
    # The source has ended: nothing old is sent, and what has no value of it is.
    assert [seen.body for seen in server.requests] == [b"second-value", b"plain"]
