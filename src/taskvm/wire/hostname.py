"""Host names and authorities as one canonical text: two spellings of one name compare equal.

Canonical: lower case, no trailing dot, A-labels (`xn--`), letters, digits, `-` and `_` only (RFC
1123 section 2.1, with the underscore that service names use). Refused: whatever some resolver or
URL parser reads as an address (`127.1`, `0x7f.1`,
`2130706433`), empty or long labels, and every other character, NUL and full-width dots among them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

MAX_NAME = 253  # characters without the trailing dot (RFC 1035 section 2.3.4)
MAX_LABEL = 63  # octets (RFC 1035 section 2.3.4)

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\Z")
# The last label decides whether a URL parser takes the whole for an address (WHATWG URL, "ends in a
# number").
_NUMBER = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)\Z")
_PORT = re.compile(r"[0-9]{1,5}\Z")


class HostNameError(ValueError):
    """Raised for a text that is no canonical host name; the message does not repeat the text."""


def parse_hostname(text: str) -> str:
    """Return the canonical form of an ASCII host name. Raises HostNameError."""
    if not text.isascii():
        raise HostNameError("it has characters outside ASCII")
    name = text.lower().removesuffix(".")
    if not 0 < len(name) <= MAX_NAME:
        raise HostNameError(f"it is not 1 to {MAX_NAME} characters long")
    labels = name.split(".")
    check_labels(labels)
    if _NUMBER.match(labels[-1]):
        raise HostNameError("it ends in a number, which some programs read as an IP address")
    return name


def parse_address(text: str) -> IPAddress | None:
    """Return the address that `text` is the usual notation of, or None.

    Zone identifiers are refused.
    """
    if "%" in text:
        return None
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def parse_host(text: str) -> str:
    """Return the canonical form of a host name or an IP literal (brackets around IPv6 optional)."""
    if text.startswith("[") and text.endswith("]"):
        address = parse_address(text[1:-1])
        if not isinstance(address, ipaddress.IPv6Address):
            raise HostNameError("only an IPv6 address stands in brackets")
        return str(address)
    address = parse_address(text)
    return str(address) if address is not None else parse_hostname(text)


def parse_authority(text: str, default_port: int) -> tuple[str, int]:
    """Return the canonical host and the port of `host`, `host:port`, `[v6]` or `[v6]:port`.

    Userinfo, an empty port and an IPv6 address without brackets are refused (RFC 9110
    section 4.2.4: userinfo misleads).
    """
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        return parse_host(text), default_port
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise HostNameError("an IPv6 address must stand in brackets")
    return parse_host(host), parse_port(port)


def parse_port(text: str) -> int:
    """Return the port that `text` writes in decimal. Raises HostNameError."""
    if not _PORT.match(text) or not 0 < int(text) < 65536:
        raise HostNameError("the port is not a number from 1 to 65535")
    return int(text)


def render_authority(host: str, port: int, default_port: int) -> str:
    """Return `host`, with brackets and a port where they are needed."""
    shown = f"[{host}]" if ":" in host else host
    return shown if port == default_port else f"{shown}:{port}"


def check_labels(labels: Iterable[str]) -> None:
    """Raise HostNameError unless these are lower-case LDH labels, valid where they are `xn--`."""
    for label in labels:
        if not _LABEL.match(label):
            raise HostNameError(
                "a label is empty, too long, or has a character that names do not have"
            )
        if label.startswith("xn--"):
            _check_punycode(label[4:])


def _check_punycode(text: str) -> None:
    # The decoder's own errors vary with the damage: UnicodeError, and OverflowError for huge
    # deltas.
    try:
        decoded = text.encode("ascii").decode("punycode")
    except (ValueError, OverflowError) as error:
        raise HostNameError("an xn-- label is not punycode") from error
    if decoded.isascii() or any(0xD800 <= ord(character) <= 0xDFFF for character in decoded):
        raise HostNameError("an xn-- label encodes nothing that needs it")
