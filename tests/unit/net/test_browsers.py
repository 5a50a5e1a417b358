"""Browsers' TLS and HTTP/2 against taskvm.net.connection: Chromium's own stack (BoringSSL), by curl_cffi.

They send GREASE everywhere, an encrypted server name (ECH) of noise, post-quantum key shares, and
settings of their own.
"""

from __future__ import annotations

import asyncio

import pytest
from curl_cffi import CurlOpt, requests
from tests.support.egress_lab import Lab, egress_lab
from tests.support.h2_lab import echo, h2_server
from tests.support.tcp import tcp_server
from tests.support.waiting import PATIENCE_S

from taskvm.wire.tls import parse_client_hello


def fetch(browser: str, lab: Lab, address: str, port: int) -> tuple[int, int, bytes]:
    """Fetch as this browser does; return the status, HTTP's version and the body."""
    options = {CurlOpt.RESOLVE: [f"api.test:{port}:{address}"]}
    with requests.Session(
        impersonate=browser, curl_options=options, verify=lab.ca_file, timeout=PATIENCE_S
    ) as session:
        answer = session.get(f"https://api.test:{port}/from-{browser}")
        return answer.status_code, answer.http_version, answer.content


@pytest.mark.parametrize("browser", ["chrome", "firefox", "safari"])
async def test_a_browser_is_served_like_any_client(browser: str) -> None:
    async with (
        h2_server(echo) as server,
        egress_lab(
            allow=["api.test"],
            allow_addresses=[f"127.0.0.1:{server.port}"],
            hosts={"api.test": ["127.0.0.1"]},
        ) as lab,
        lab.guest.listen(
            await lab.address_of("api.test"), server.port, local=("127.0.0.2", server.port)
        ),
    ):
        answer = await asyncio.to_thread(fetch, browser, lab, "127.0.0.2", server.port)

        assert lab.denials("tls") == []
    assert answer == (200, 3, f"/from-{browser}".encode())  # 3: CURL_HTTP_VERSION_2_0


async def test_what_chromium_sends_has_an_encrypted_server_name() -> None:
    """Else the test above would show nothing about ECH."""
    hellos: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        record = await reader.readexactly(5)
        hellos.append(record + await reader.readexactly(int.from_bytes(record[3:], "big")))

    async with tcp_server(serve) as port, egress_lab() as lab:
        with pytest.raises(requests.RequestsError):
            await asyncio.to_thread(fetch, "chrome", lab, "127.0.0.1", port)

    hello = parse_client_hello(hellos[0])
    assert hello is not None
    assert (hello.server_name, hello.encrypted) == ("api.test", True)
    assert hello.alpn == (b"h2", b"http/1.1")
