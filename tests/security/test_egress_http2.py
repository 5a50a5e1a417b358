"""Rules, secrets and reflection on HTTP/2, where many requests share a connection and bodies come in frames."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.egress_lab import Lab, egress_lab
from tests.support.h2_lab import Call, H2Client, H2Server, fields, h2_client, h2_server

from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret

VALUE = "sk-live-0123456789abcdef"
RULES = """
[[rules]]
name = "read"
action = "allow"
hosts = ["api.test"]
methods = ["GET", "POST"]
paths = ["/public/**"]
"""


def repeat(call: Call, ended: bool) -> None:
    """Answer with what came, in both heads, in a body of small frames and in a trailer, in base64 too."""
    if ended:
        shown = call.seen.get(b"authorization") or b"none"
        call.head(103, link=shown.decode())
        call.head(200, content_type="text/plain", x_shown=shown.decode())
        for at in range(0, len(shown), 5):
            call.data(shown[at : at + 5])
        call.data(call.seen.body)
        encoded = base64.b64encode(b"u:" + shown).decode()
        call.trailers(x_last=shown.decode(), x_basic=encoded)


@asynccontextmanager
async def talking() -> AsyncIterator[tuple[Lab, H2Server, H2Client]]:
    async with (
        h2_server(repeat) as server,
        egress_lab(
            rules=RULES,
            allow_addresses=[f"127.0.0.1:{server.port}"],
            hosts={"api.test": ["127.0.0.1"]},
            secrets=[Secret("KEY", VALUE, hosts=["api.test"], places=["body"])],
        ) as lab,
        h2_client(lab, "api.test", server.port) as client,
    ):
        yield lab, server, client
        assert VALUE.encode() not in b"".join(lab.lines)


async def test_every_stream_is_judged_by_itself() -> None:
    async with talking() as (_, server, client):
        authority = f"api.test:{server.port}"
        numbers = [
            await client.send(fields(authority, path, method))
            for path, method in (
                ("/public/a", "GET"), ("/admin", "GET"), ("/public/../admin", "GET"),
                ("/public/b", "DELETE"), ("/public/c", "GET"),
            )
        ]  # fmt: skip
        answers = await client.finish(*numbers)

    assert [answer.status for answer in answers] == [200, 403, 403, 403, 200]
    assert [seen.get(b":path") for seen in server.requests] == [b"/public/a", b"/public/c"]


async def test_a_value_goes_into_header_and_frames_and_comes_back_as_the_placeholder() -> None:
    async with talking() as (lab, server, client):
        authority, placeholder = f"api.test:{server.port}", lab.secrets[0].placeholder
        number = await client.send(
            fields(authority, "/public/a", "POST", authorization=f"Bearer {placeholder}"), b""
        )
        (plain,) = await client.finish(number)
        cut = await client.ask(
            fields(authority, "/public/b", "POST", authorization=placeholder),
            placeholder.encode(),
        )

    assert [seen.get(b"authorization") for seen in server.requests] == [
        f"Bearer {VALUE}".encode(), VALUE.encode(),
    ]  # fmt: skip
    assert server.requests[1].body == VALUE.encode()
    assert plain.headers["x-shown"] == f"Bearer {placeholder}"
    assert plain.body == f"Bearer {placeholder}".encode()
    assert cut.body == placeholder.encode() * 2
    assert cut.trailers["x-last"] == placeholder
    assert placeholder in cut.trailers["x-basic"]
    assert plain.informational == [103]
    assert VALUE not in repr((plain, cut))


async def test_a_value_that_comes_in_frames_is_broken_off_and_other_streams_go_on() -> None:
    async with talking() as (lab, server, client):
        authority = f"api.test:{server.port}"
        number = client.connection.get_next_available_stream_id()
        client.connection.send_headers(number, fields(authority, "/public/leak", "POST"))
        await client.flush()
        client.connection.send_data(number, VALUE[:9].encode())
        await client.flush()
        client.connection.send_data(number, VALUE[9:].encode(), end_stream=True)
        await client.flush()
        after = await client.ask(fields(authority, "/public/after"))

        assert lab.denials("secret")[0].secrets == ("KEY",)
    assert after.status == 200
    assert b"sk-live" not in b"".join(seen.body for seen in server.requests)


async def test_a_narrower_policy_ends_the_connection_with_all_its_streams() -> None:
    async with talking() as (lab, server, client):
        authority = f"api.test:{server.port}"
        assert (await client.ask(fields(authority, "/public/a"))).status == 200

        lab.gateway.change_policy(Policy())
        await client.read_to_end()

        assert client.closed
        assert lab.denials("connect")[-1].rule == "policy-changed"
    assert len(server.requests) == 1
