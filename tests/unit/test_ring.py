"""taskvm.ring: the last bytes of a stream, by position."""

from hypothesis import given
from hypothesis import strategies as st

from taskvm.ring import Ring


@given(st.integers(1, 20), st.lists(st.binary(max_size=30)), st.integers(0, 200))
def test_a_ring_is_the_end_of_the_whole_stream(
    capacity: int, pieces: list[bytes], asked: int
) -> None:
    """Whatever is written in whatever pieces, a reader gets what is kept, and knows what is not."""
    ring = Ring(capacity)
    for piece in pieces:
        ring.append(piece)
    whole = b"".join(pieces)
    position = min(asked, len(whole))

    skipped, data = ring.read(position, 1000)

    assert (ring.end, ring.start) == (len(whole), max(0, len(whole) - capacity))
    assert skipped == max(0, ring.start - position)
    assert data == whole[position + skipped :]


def test_a_reader_gets_at_most_what_it_asks_for() -> None:
    ring = Ring(10)
    ring.append(b"0123456789")

    assert ring.read(2, 3) == (0, b"234")
