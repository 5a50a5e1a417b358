"""The gateway's limits of time that no test is about: a host that gives this process no time is no finding."""

from __future__ import annotations

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm.net import connection, http1guest, http2, relay, resolver, upstream

_LIMITS = [
    (connection, "SNIFF_TIMEOUT_S"),
    (connection, "HANDSHAKE_TIMEOUT_S"),
    (connection, "LINGER_S"),
    (http1guest, "HEAD_TIMEOUT_S"),
    (http2, "GOAWAY_TIMEOUT_S"),
    (relay, "REFUSAL_TIMEOUT_S"),
    (resolver, "LOOKUP_TIMEOUT_S"),
    (upstream, "CONNECT_TIMEOUT_S"),
    (upstream, "HANDSHAKE_TIMEOUT_S"),
]


@pytest.fixture(autouse=True)
def patient_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test is about it sets itself."""
    for module, name in _LIMITS:
        monkeypatch.setattr(module, name, PATIENCE_S)
