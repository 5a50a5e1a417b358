"""Clients that people use, in a real guest, against real servers: HTTP/2, WebSocket, gRPC, passthrough, apt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.servers import http_server, tls_context

from taskvm import Sandbox

pytestmark = pytest.mark.vm


def audit_of(vm: Sandbox) -> list[dict[str, object]]:
    return [json.loads(line) for line in vm.audit_path.read_text().splitlines()]


async def test_a_pinned_host_is_verified_by_the_guest_itself(tmp_path: Path) -> None:
    """With passthrough the guest sees the server's own certificate, which the host's --ca-file vouches for."""
    ca = tmp_path / "ca.pem"
    with http_server(tls_context("pinned.test", ca)) as pinned:
        options = {
            "allow": ["pinned.test"],
            "passthrough": ["pinned.test"],
            "resolve": {"pinned.test": "127.0.0.1"},
            "allow_addresses": ["127.0.0.1"],
            "extra_ca_files": [ca],
        }
        async with Sandbox.create(**GUEST, **options) as vm:
            url = f"https://pinned.test:{pinned.port}/quiet"
            seen = await vm.exec(f"curl -sSv {url} 2>&1", timeout_s=30)
            audit = audit_of(vm)

    assert "issuer: O=trustme" in seen.stdout, seen.stdout
    assert '{"user": "me"}' in seen.stdout
    assert next(line["rule"] for line in audit if line["kind"] == "tls") == "passthrough"
    assert "/quiet" not in json.dumps(audit)
