"""What one sandbox has in flight (taskvm.net.inflight); tests/security/test_http2.py attacks it."""

from __future__ import annotations

import pytest

from taskvm.net import inflight
from taskvm.net.inflight import LEAST_WINDOW, InFlight
from taskvm.wire.message import Asked, HttpRefused, RequestHead


def asked(size: int) -> Asked:
    return Asked(b"GET", b"/", RequestHead(b"GET", b"/", [(b"x", b"y" * size)]))


def test_requests_are_counted_until_they_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflight, "MAX_REQUESTS", 2)
    in_flight = InFlight()

    assert [in_flight.take(asked(1)) for _ in range(3)] == [True, True, False]
    in_flight.give_back(asked(1))
    assert [in_flight.take(asked(1)) for _ in range(2)] == [True, False]


def test_the_memory_of_heads_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflight, "MAX_HEADS_BYTES", 1000)
    in_flight = InFlight()

    assert not in_flight.take(asked(1000))
    assert in_flight.take(asked(700))
    assert not in_flight.take(asked(700))
    assert in_flight.take(Asked(b"GET", b"/", HttpRefused(400, "")))  # nothing of it is kept
    in_flight.give_back(asked(700))
    assert in_flight.take(asked(700))


def test_the_windows_of_all_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections past the bound work too, with less."""
    monkeypatch.setattr(inflight, "WINDOWS_BYTES", 2_000_000)
    in_flight = InFlight()

    with (
        in_flight.window(1_500_000) as first,
        in_flight.window(1_500_000) as second,
        in_flight.window(300_000) as third,
    ):
        assert (first, second, third) == (1_500_000, LEAST_WINDOW, 300_000)
    with in_flight.window(1_500_000) as again:
        assert again == 1_500_000
