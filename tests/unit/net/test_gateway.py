"""The gateway with real clients: curl and Python's own, over HTTP and HTTPS, to real servers."""

from __future__ import annotations

import asyncio
import http.client
import socket
from pathlib import Path

from egress_lab import Lab, egress_lab, http_server

VALUE = "sk-live-0123456789abcdef"


async def curl(*arguments: str) -> tuple[str, int]:
    """Run the real curl; return what it printed and its exit code."""
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "--max-time", "20", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    output, _ = await process.communicate()
    return output.decode(), process.returncode or 0


async def test_curl_fetches_over_http() -> None:
    with http_server() as server:
        async with egress_lab(
            allow=["api.test"],
            allow_addresses=[f"127.0.0.1:{server.port}"],
            hosts={"api.test": ["127.0.0.1"]},
        ) as lab:
            address = await lab.address_of("api.test")

            async with lab.guest.listen(address, server.port) as local:
                output, code = await curl(
                    "--connect-to", f"api.test:{server.port}:127.0.0.1:{local}",
                    f"http://api.test:{server.port}/path?query=1",
                )  # fmt: skip

    assert (output, code) == ("hello from the server", 0)
    assert server.requests[0].path == "/path?query=1"
    assert server.requests[0].header("Host") == f"api.test:{server.port}"
    assert [(e.kind, e.decision) for e in lab.events] == [
        ("dns", "allow"), ("request", "allow"), ("connect", "allow"), ("response", "allow"),
    ]  # fmt: skip


async def test_curl_uploads_over_https_and_trusts_our_authority_only(tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(b"x" * 3_000_000)
    with http_server("api.test") as server:
        async with egress_lab(
            allow=["api.test"],
            allow_addresses=[f"127.0.0.1:{server.port}"],
            hosts={"api.test": ["127.0.0.1"]},
        ) as lab:
            address = await lab.address_of("api.test")

            async with lab.guest.listen(address, server.port) as local:
                output, code = await curl(
                    "--connect-to", f"api.test:{server.port}:127.0.0.1:{local}",
                    "--cacert", lab.ca_file, "--data-binary", f"@{upload}",
                    f"https://api.test:{server.port}/",
                )  # fmt: skip

    assert (len(output), code) == (3_000_000, 0)
    assert len(server.requests[0].body) == 3_000_000


async def test_python_keeps_its_connection_alive_with_strict_verification() -> None:
    with http_server("api.test") as server:
        async with egress_lab(
            allow=["api.test"],
            allow_addresses=[f"127.0.0.1:{server.port}"],
            hosts={"api.test": ["127.0.0.1"]},
        ) as lab:
            address = await lab.address_of("api.test")

            async with lab.guest.listen(address, server.port) as local:
                bodies = await asyncio.to_thread(_python_client, lab, server.port, local)

    assert bodies == [b"hello from the server", b"posted", b"hello from the server"]
    assert server.connections == 1
    assert [request.method for request in server.requests] == ["GET", "POST", "HEAD", "GET"]


def _python_client(lab: Lab, port: int, local: int) -> list[bytes]:
    client = http.client.HTTPSConnection("api.test", port, timeout=20)
    raw = socket.create_connection(("127.0.0.1", local), timeout=20)
    client.sock = lab.client_tls().wrap_socket(raw, server_hostname="api.test")
    bodies = []
    for method, body in (("GET", None), ("POST", b"posted"), ("HEAD", None), ("GET", None)):
        client.request(method, "/", body)
        response = client.getresponse()
        assert response.status == 200
        assert response.getheader("Alt-Svc") is None
        content = response.read()
        if method != "HEAD":
            bodies.append(content)
    client.close()
    return bodies
