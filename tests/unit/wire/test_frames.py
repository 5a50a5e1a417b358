"""The frame codec: round trips, any cut, and nothing but FrameError whatever comes."""

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.wire.frames import (
    HEADER_SIZE,
    MAX_DATA,
    MAX_PAYLOAD,
    Frame,
    FrameDecoder,
    FrameError,
    FrameType,
    decode_u32,
    encode_frame,
    encode_header,
    encode_u32,
)

data_frames = st.builds(
    Frame,
    st.just(FrameType.DATA),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.binary(min_size=1, max_size=300),
)


def encoded(frames: list[Frame]) -> bytes:
    return b"".join(encode_frame(f.type, f.channel, f.stream, f.payload) for f in frames)


@given(st.lists(data_frames, max_size=6), st.lists(st.integers(0, 2000), max_size=8))
def test_frames_survive_any_cut(frames: list[Frame], cuts: list[int]) -> None:
    """Whatever the pieces they arrive in, the same frames come out, in order."""
    stream = encoded(frames)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    decoder = FrameDecoder()

    got = [
        frame
        for start, end in itertools.pairwise(edges)
        for frame in decoder.feed(stream[start:end])
    ]

    assert [(f.type, f.channel, f.stream, bytes(f.payload)) for f in got] == [
        (f.type, f.channel, f.stream, f.payload) for f in frames
    ]


@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_frame_error(noise: bytes) -> None:
    """Noise is refused with FrameError, or its frames are exactly the bytes that were read."""
    decoder = FrameDecoder()
    frames: list[Frame] = []

    with contextlib.suppress(FrameError):
        for position in range(0, len(noise), 7):
            frames += decoder.feed(noise[position : position + 7])

    assert noise.startswith(encoded(frames))


@pytest.mark.parametrize(
    "header",
    [
        encode_header(FrameType.DATA, 0, 1, MAX_DATA + 1),
        encode_header(FrameType.DATA, 0, 1, 0),
        encode_header(FrameType.CREDIT, 0, 1, 5),
        encode_header(FrameType.END, 0, 1, 1),
        encode_header(FrameType.FUSE, 0, 1, MAX_PAYLOAD + 1),
        encode_header(FrameType.DATA, 0, 1, 2**32 - 1),
        b"\x01\0\0\0\x63\0\0\0\0\0\0\0",
        b"\x01\0\0\0\x03\0\x01\0\0\0\0\0",
    ],
)
def test_a_bad_header_is_refused_before_its_payload_arrives(header: bytes) -> None:
    """Length, type and reserved field are judged from the header alone: nothing is held for a lie."""
    assert len(header) == HEADER_SIZE

    with pytest.raises(FrameError):
        FrameDecoder().feed(header)


def test_a_port_may_narrow_the_payload() -> None:
    """A decoder made with a smaller limit refuses what the protocol would allow elsewhere."""
    header = encode_header(FrameType.REPLY, 0, 1, 2048)

    FrameDecoder().feed(header)
    with pytest.raises(FrameError):
        FrameDecoder(max_payload=1024).feed(header)


@given(st.lists(data_frames, max_size=20), st.integers(1, 7))
def test_a_limit_cuts_the_work_and_loses_nothing(frames: list[Frame], limit: int) -> None:
    """Asked again and again for a few, the decoder gives all frames in order."""
    decoder = FrameDecoder()
    rounds = [decoder.feed(encoded(frames), limit)]
    while len(rounds[-1]) == limit:
        rounds.append(decoder.feed(b"", limit))

    got = [frame for some in rounds for frame in some]
    assert all(len(some) <= limit for some in rounds)
    assert encoded(got) == encoded(frames)


@given(st.integers(0, 2**32 - 1))
def test_u32_round_trip(value: int) -> None:
    """CREDIT and RESET carry their number unchanged."""
    assert decode_u32(encode_u32(value)) == value
