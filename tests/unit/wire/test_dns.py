"""DNS: one question in, one answer out, and no bytes that raise anything else."""

from __future__ import annotations

import contextlib
import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.wire.dns import DnsError, Query, RCode, build_answer, parse_query, pointed_address

HEADER = struct.pack(">HHHHHH", 0x1234, 0x0100, 1, 0, 0, 0)
QUESTION = b"\x03Api\x04test\x00" + struct.pack(">HH", 1, 1)
EDNS = b"\x00" + struct.pack(">HHIH", 41, 4096, 0, 0)


def test_a_query_is_read_and_its_spelling_kept() -> None:
    query = parse_query(HEADER + QUESTION)

    assert query == Query(0x1234, "api.test", 1, True, QUESTION)


def test_an_edns_record_is_stepped_over() -> None:
    header = struct.pack(">HHHHHH", 1, 0, 1, 0, 0, 1)

    assert parse_query(header + QUESTION + EDNS).name == "api.test"


def test_an_answer_repeats_the_question_and_points_to_it() -> None:
    query = parse_query(HEADER + QUESTION)

    answer = build_answer(query, RCode.NOERROR, ipaddress.IPv4Address("198.18.0.16"))

    assert answer[:12] == struct.pack(">HHHHHH", 0x1234, 0x8180, 1, 1, 0, 0)
    assert answer[12:] == QUESTION + struct.pack(">HHHIH4B", 0xC00C, 1, 1, 60, 4, 198, 18, 0, 16)


def test_a_refusal_has_no_records() -> None:
    answer = build_answer(parse_query(HEADER + QUESTION), RCode.NXDOMAIN)

    assert answer == struct.pack(">HHHHHH", 0x1234, 0x8183, 1, 0, 0, 0) + QUESTION


def header(flags: int = 0x0100, *counts: int) -> bytes:
    return struct.pack(">HHHHHH", 0x1234, flags, *(counts or (1, 0, 0, 0)))


@pytest.mark.parametrize(
    ("message", "rcode"),
    [
        (header(0x2900) + QUESTION, RCode.NOTIMP),
        (header(0x0300) + QUESTION, RCode.FORMERR),
        (header(0x0100, 2, 0, 0, 0) + QUESTION * 2, RCode.FORMERR),
        (header(0x0100, 0, 0, 0, 0), RCode.FORMERR),
        (header(0x0100, 1, 1, 0, 0) + QUESTION, RCode.FORMERR),
        (header(0x0100, 1, 0, 0, 2) + QUESTION + EDNS * 2, RCode.FORMERR),
        (header(0x0100, 1, 0, 0, 1) + QUESTION + QUESTION, RCode.FORMERR),
        (header(0x0100, 1, 0, 0, 1) + QUESTION + EDNS[:-1] + b"\x09", RCode.FORMERR),
        (header() + QUESTION + b"x", RCode.FORMERR),
        (header() + QUESTION[:-1], RCode.FORMERR),
        (header() + b"\xc0\x0c" + QUESTION[-4:], RCode.FORMERR),
        (header() + b"\x03a.b\x03com\x00" + QUESTION[-4:], RCode.FORMERR),
        (header() + b"\x03a\x00b\x03com\x00" + QUESTION[-4:], RCode.FORMERR),
        (header() + b"\x00" + QUESTION[-4:], RCode.FORMERR),
        (header() + b"\x3f" + b"a" * 63 + b"\x40" + QUESTION[-4:], RCode.FORMERR),
        (header() + (b"\x3f" + b"a" * 63) * 5 + b"\x00" + QUESTION[-4:], RCode.FORMERR),
        (header() + QUESTION[:-2] + b"\x00\x03", RCode.REFUSED),
        (header() + QUESTION + b"x" * 600, RCode.FORMERR),
    ],
)
def test_what_is_no_plain_query_is_answered_with_an_error(message: bytes, rcode: RCode) -> None:
    with pytest.raises(DnsError) as caught:
        parse_query(message)

    assert caught.value.reply[:2] == b"\x12\x34"
    assert caught.value.reply[2] & 0x80
    assert caught.value.reply[3] & 15 == rcode


@pytest.mark.parametrize("message", [b"", b"x" * 11, header(0x8180) + QUESTION])
def test_what_could_start_a_loop_is_not_answered(message: bytes) -> None:
    with pytest.raises(DnsError) as caught:
        parse_query(message)

    assert caught.value.reply == b""


@given(st.binary(max_size=600))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    for message in (data, HEADER + data, HEADER + QUESTION + data):
        with contextlib.suppress(DnsError):
            assert parse_query(message).name.isascii()


@given(st.integers(0, len(HEADER + QUESTION)), st.integers(0, 255))
def test_a_damaged_query_raises_nothing_else(position: int, byte: int) -> None:
    message = bytearray(HEADER + QUESTION + b"\0")
    message[position] = byte

    for cut in (len(message), position):
        try:
            parse_query(bytes(message[:cut]))
        except DnsError:
            continue


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("16.0.18.198.in-addr.arpa", "198.18.0.16"),
        ("0.18.198.in-addr.arpa", None),
        ("1.2.3.4.5.in-addr.arpa", None),
        ("256.0.18.198.in-addr.arpa", None),
        ("x.0.18.198.in-addr.arpa", None),
        ("16.0.18.198.in-addr.arpa.evil.test", None),
        ("in-addr.arpa", None),
    ],
)
def test_the_name_of_an_address_is_asked_for_in_one_form(name: str, address: str | None) -> None:
    found = pointed_address(name)

    assert (None if found is None else str(found)) == address
