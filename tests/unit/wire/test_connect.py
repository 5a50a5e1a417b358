"""The OPEN of the net port: what both sides send, and what a guest may not."""

import msgspec
import pytest

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
        [],
    ],
)
def test_another_map_is_refused(request_map: object) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_connect(msgspec.msgpack.encode(request_map))
