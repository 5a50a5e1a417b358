"""DNS messages (RFC 1035) for a server that knows every answer itself: one question, one answer.

Refused: more than one question, compression in the question, labels that are no host name, and
every message that is not a plain query. An EDNS record (RFC 6891) is stepped over and not answered,
as a server without EDNS does. The only exception is DnsError, whatever bytes come.
"""

from __future__ import annotations

import enum
import ipaddress
import struct
from dataclasses import dataclass

from taskvm.wire.hostname import MAX_LABEL, HostNameError, parse_hostname

TTL_S = 60
MAX_QUERY = 512  # bytes; a query with one question is at most 271, the rest is EDNS options

_HEADER = struct.Struct(">HHHHHH")
_QUESTION = struct.Struct(">HH")
_ANSWER = struct.Struct(">HHHIH")

_QR, _OPCODE, _TC, _RD, _RA = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080
_CLASS_IN = 1
_TYPE_OPT = 41
_REVERSE = ".in-addr.arpa"
_POINTER_TO_QUESTION = 0xC000 | _HEADER.size


class RCode(enum.IntEnum):
    """How a query was answered (RFC 1035 section 4.1.1)."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5


class QType(enum.IntEnum):
    """The types that are answered: a host has an A record and nothing else, its address a PTR record."""

    A = 1
    PTR = 12
    AAAA = 28
    SVCB = 64
    HTTPS = 65


class DnsError(ValueError):
    """Raised for a message that is not answered with a name's data.

    `reply` answers it, b"" means: not at all.
    """

    def __init__(self, reason: str, reply: bytes = b"") -> None:
        super().__init__(reason)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Query:
    """One question.

    `name` is canonical; `question` is the guest's own spelling, which the answer must repeat.
    """

    id: int
    name: str
    qtype: int
    recursion_desired: bool
    question: bytes


def parse_query(data: bytes) -> Query:
    """Read a query. Raises DnsError."""
    if len(data) < _HEADER.size:
        raise DnsError("the message is shorter than a header")
    identity, flags, questions, answers, authorities, additional = _HEADER.unpack_from(data)
    if flags & _QR:
        raise DnsError("the message is a response")  # never answered: two servers would loop
    if flags & _OPCODE:
        raise DnsError(
            "the message is not a standard query", _refuse(identity, flags, RCode.NOTIMP)
        )
    malformed = _refuse(identity, flags, RCode.FORMERR)
    if len(data) > MAX_QUERY or flags & _TC:
        raise DnsError("the query is too long", malformed)
    if (questions, answers, authorities) != (1, 0, 0) or additional > 1:
        raise DnsError("the query does not have exactly one question", malformed)
    try:
        name, end = _read_name(data)
        qtype, qclass = _QUESTION.unpack_from(data, end)
    except (struct.error, IndexError) as error:
        raise DnsError("the question is cut short", malformed) from error
    except HostNameError as error:
        raise DnsError(f"the name is refused: {error}", malformed) from error
    end += _QUESTION.size
    _check_rest(data[end:], additional, malformed)
    if qclass != _CLASS_IN:
        raise DnsError("the class is not IN", _refuse(identity, flags, RCode.REFUSED))
    return Query(identity, name, qtype, bool(flags & _RD), data[_HEADER.size : end])


def build_answer(
    query: Query, rcode: RCode, data: ipaddress.IPv4Address | str | None = None
) -> bytes:
    """Return the answer to `query`: `rcode`, and a record where there is data.

    An address is an A record, a canonical name a PTR record.
    """
    flags = _QR | _RA | (_RD if query.recursion_desired else 0) | rcode
    header = _HEADER.pack(query.id, flags, 1, 0 if data is None else 1, 0, 0)
    if data is None:
        return header + query.question
    if isinstance(data, str):
        qtype, content = QType.PTR, _encode_name(data)
    else:
        qtype, content = QType.A, data.packed
    record = _ANSWER.pack(_POINTER_TO_QUESTION, qtype, _CLASS_IN, TTL_S, len(content))
    return header + query.question + record + content


def pointed_address(name: str) -> ipaddress.IPv4Address | None:
    """Return the address that a name below in-addr.arpa asks for the name of (RFC 1035 section 3.5)."""
    numbers = name.removesuffix(_REVERSE).split(".")
    if not name.endswith(_REVERSE) or len(numbers) != 4:
        return None
    try:
        return ipaddress.IPv4Address(".".join(reversed(numbers)))
    except ValueError:
        return None


def _encode_name(name: str) -> bytes:
    labels = name.encode("ascii").split(b".")
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def _read_name(data: bytes) -> tuple[str, int]:
    labels: list[bytes] = []
    position = _HEADER.size
    while length := data[position]:
        # More is a pointer (0xc0) or an extended label: the question is first, nothing to point at.
        if length > MAX_LABEL:
            raise HostNameError("it is compressed")
        label = data[position + 1 : position + 1 + length]
        if len(label) != length:
            raise IndexError
        if b"." in label:
            raise HostNameError("a label holds a dot")
        labels.append(label)
        position += 1 + length
        if position - _HEADER.size > 254:
            raise HostNameError("it is longer than 253 characters")
    return parse_hostname(b".".join(labels).decode("latin-1")), position + 1


def _check_rest(rest: bytes, additional: int, malformed: bytes) -> None:
    if additional == 0 and not rest:
        return
    # An OPT record: root name, type 41, class, TTL, and options that fill the rest of the message.
    is_opt = additional == 1 and len(rest) >= 11 and rest[0] == 0
    if not is_opt or int.from_bytes(rest[1:3], "big") != _TYPE_OPT:
        raise DnsError("there is something after the question", malformed)
    if int.from_bytes(rest[9:11], "big") != len(rest) - 11:
        raise DnsError("the EDNS record is cut short", malformed)


def _refuse(identity: int, flags: int, rcode: RCode) -> bytes:
    return _HEADER.pack(identity, _QR | _RA | (flags & (_OPCODE | _RD)) | rcode, 0, 0, 0, 0)
