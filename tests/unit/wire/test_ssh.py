"""SSH's refusal (taskvm.wire.ssh): a packet that RFC 4253 section 6 describes."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from taskvm.wire.ssh import MAX_TEXT, is_ssh, render_disconnect


@given(st.text(max_size=600))
def test_the_refusal_is_one_whole_packet(text: str) -> None:
    version, _, packet = render_disconnect(text).partition(b"\r\n")

    length, padding = struct.unpack_from(">IB", packet)
    code, reason, size = struct.unpack_from(">BII", packet, 5)
    assert version == b"SSH-2.0-taskvm"
    assert length + 4 == len(packet)
    assert len(packet) % 8 == 0
    assert 4 <= padding < 256
    assert (code, reason, size) == (1, 1, min(len(text), MAX_TEXT))
    assert packet[14 : 14 + size].isascii()


def test_a_client_is_told_by_its_first_bytes() -> None:
    assert is_ssh(b"SSH-2.0-OpenSSH_9.2")
    assert not is_ssh(b"GET / HTTP/1.1")
