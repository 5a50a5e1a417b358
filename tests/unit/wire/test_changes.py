"""taskvm.wire.changes: any cut gives the same changes, and noise nothing but ChangeError."""

import contextlib
import itertools
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.wire.changes import MAX_RECORD, ChangeDecoder, ChangeError, ChangeRecord

names = st.lists(
    st.binary(min_size=1, max_size=8).filter(
        lambda name: name not in (b".", b"..") and not set(name) & {0, 47}
    ),
    max_size=3,
).map(b"/".join)
changes = st.builds(
    ChangeRecord, kind=st.sampled_from(["created", "deleted"]), path=names, dir=st.integers(0, 1)
) | st.builds(ChangeRecord, kind=st.just("moved"), path=names, dir=st.just(0), old=names)


def packed(record: object) -> bytes:
    content = msgspec.msgpack.encode(record)
    return struct.pack("<I", len(content)) + content


@given(st.lists(changes, max_size=6), st.lists(st.integers(0, 300), max_size=6))
def test_changes_survive_any_cut(told: list[ChangeRecord], cuts: list[int]) -> None:
    stream = b"".join(map(packed, told))
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    decoder = ChangeDecoder()

    heard = [
        change
        for start, end in itertools.pairwise(edges)
        for change in decoder.feed(stream[start:end])
    ]

    assert heard == told


@given(st.binary(max_size=200))
def test_noise_raises_nothing_but_change_error(noise: bytes) -> None:
    with contextlib.suppress(ChangeError):
        ChangeDecoder().feed(noise)
    with contextlib.suppress(ChangeError):
        ChangeDecoder().feed(struct.pack("<I", len(noise)) + noise)


@pytest.mark.parametrize(
    "lie",
    [
        {"kind": "created", "path": b"../up", "dir": 0},
        {"kind": "created", "path": b"/etc/passwd", "dir": 0},
        {"kind": "created", "path": b"a//b", "dir": 0},
        {"kind": "created", "path": b"a\0b", "dir": 0},
        {"kind": "created", "path": b"x" * 4096, "dir": 0},
        {"kind": "painted", "path": b"a", "dir": 0},
        {"kind": "created", "path": b"a", "dir": 2},
        {"kind": "created", "path": b"a", "dir": 0, "from": b"b"},
        {"kind": "moved", "path": b"a", "dir": 0},
        {"kind": "moved", "path": b"a", "dir": 0, "from": b".."},
        {"kind": "created", "path": b"a", "dir": 0, "more": 1},
    ],
)
def test_a_change_that_cannot_be_is_refused(lie: dict[str, object]) -> None:
    with pytest.raises(ChangeError):
        ChangeDecoder().feed(packed(lie))


def test_a_record_is_refused_by_its_length_alone() -> None:
    with pytest.raises(ChangeError, match=str(MAX_RECORD + 1)):
        ChangeDecoder().feed(struct.pack("<I", MAX_RECORD + 1))
