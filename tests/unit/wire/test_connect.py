"""The OPEN of the net port: what both sides send, and what a guest may not."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.wire.connect import ConnectRequest, decode_connect, encode_connect


def test_a_request_is_the_map_of_the_protocol() -> None:
    payload = encode_connect(ConnectRequest("127.0.0.1", 8000))

    assert msgspec.msgpack.decode(payload) == {"op": "connect", "addr": "127.0.0.1", "port": 8000}
    assert decode_connect(payload) == ConnectRequest("127.0.0.1", 8000)


@pytest.mark.parametrize(
    "request_map",
    [
        {"op": "listen", "addr": "127.0.0.1", "port": 8000},
        {"op": "connect", "addr": "127.0.0.1", "port": 0},
        {"op": "connect", "addr": "127.0.0.1", "port": 65536},
        {"op": "connect", "addr": "127.0.0.1", "port": True},
        {"op": "connect", "addr": b"127.0.0.1", "port": 80},
        {"op": "connect", "addr": "127.0.0.1", "port": 80, "more": 1},
        {"op": "connect", "port": 80},
        {"op": "connect", "addr": "127.0.0.1", "port": 80, "exec": "5"},
        {"op": "connect", "addr": "127.0.0.1", "port": 80, "exec": 5.5},
        {"op": "connect", "addr": "127.0.0.1", "port": 80, "exec": True},
        {"op": "connect", "addr": "127.0.0.1", "port": 80, "exec": None},
        [],
    ],
)
def test_another_map_is_refused(request_map: object) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_connect(msgspec.msgpack.encode(request_map))


@pytest.mark.parametrize("number", [0, 1, -1, 2**31, 2**64 - 1])
def test_any_number_may_be_said_to_be_an_exec(number: int) -> None:
    said = {"op": "connect", "addr": "198.18.0.1", "port": 443, "exec": number}

    assert decode_connect(msgspec.msgpack.encode(said)).exec == number


def test_no_exec_is_zero_and_is_not_sent() -> None:
    said = {"op": "connect", "addr": "198.18.0.1", "port": 443}

    request = decode_connect(msgspec.msgpack.encode(said))

    assert request.exec == 0
    assert msgspec.msgpack.decode(encode_connect(request)) == said


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(
    st.binary(max_size=80)
    | ANYTHING.map(
        lambda value: msgspec.msgpack.encode(
            {"op": "connect", "addr": "1.2.3.4", "port": 80, "exec": value}
        )
    ),
    st.integers(0, 80),
)
def test_random_bytes_raise_only_what_is_documented(payload: bytes, cut: int) -> None:
    """Whole or cut anywhere: a request with a number comes out, or the documented error."""
    for piece in (payload, payload[:cut]):
        try:
            request = decode_connect(piece)
        except (msgspec.MsgspecError, ValueError):
            continue
        assert type(request.exec) is int
        assert 1 <= request.port <= 65535
