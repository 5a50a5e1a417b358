"""Sets of hosts and addresses as a person writes them: `api.example.com`, `*.example.com:8443`, `10.1.0.0/16`.

Rule 1: a pattern matches whole labels, never substrings, and never more than one registered domain.
Rule 2: what two programs could read differently (`127.1`, full-width dots, some internationalized
        names) is refused when it is written, not when it is used.
"""

from __future__ import annotations

import ipaddress
import unicodedata
from dataclasses import dataclass, replace

from taskvm.errors import UsageError
from taskvm.wire.address import special_range
from taskvm.wire.hostname import (
    HostNameError,
    IPAddress,
    parse_address,
    parse_hostname,
    parse_port,
)

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# A network wider than this is a slip of the pen; fc00::/7 is the widest that has a use.
MIN_PREFIX = {4: 8, 6: 7}

_PATTERN_HELP = (
    "Write a host (api.example.com), all its subdomains (*.example.com), an IP address or a "
    "network (192.0.2.7, 10.1.0.0/16), each with :port where only that port is meant"
)
# Registries sell names below these second-level labels, as in co.uk: a wildcard there spans
# strangers' domains.
_REGISTRY_LABELS = frozenset({"ac", "co", "com", "edu", "gov", "ne", "net", "or", "org"})
# IDNA2003 (Python's codec) and IDNA2008 (browsers) disagree on the first four characters (UTS 46
# section 7); the last three are dots to some programs only.
_DEVIATING = frozenset("\u00df\u03c2\u200c\u200d\u3002\uff0e\uff61")


@dataclass(frozen=True, slots=True)
class HostPattern:
    """A set of hosts: one name, its subdomains (`wildcard`), or the addresses of `network`.

    `port` None means every port.
    """

    host: str
    wildcard: bool = False
    network: IPNetwork | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> HostPattern:
        """Read a pattern as a person writes it.

        Raises UsageError that says what is wrong and what to write.
        """
        try:
            host, port = _split_port(text)
            network = _parse_network(host)
            if network is not None:
                return cls(str(network), network=network, port=port)
            if host.startswith("*."):
                return cls(_check_wildcard(to_ascii(host[2:])), wildcard=True, port=port)
            return cls(to_ascii(host), port=port)
        except HostNameError as error:
            raise UsageError(
                f"read the host pattern {text!r}", str(error), _PATTERN_HELP
            ) from error

    def matches(self, host: str, port: int | None = None) -> bool:
        """Say whether a canonical host belongs to the set. `port` None asks: on any port?"""
        if port is not None and self.port not in (None, port):
            return False
        if self.network is not None:
            address = parse_address(host)
            return address is not None and address in self.network
        return host.endswith("." + self.host) if self.wildcard else host == self.host

    def covers(self, other: HostPattern) -> bool:
        """Say whether every (host, port) of `other` belongs to this set too."""
        if self.port not in (None, other.port):
            return False
        if self.network is not None or other.network is not None:
            return contains(self.network, other.network)
        if not other.wildcard:
            return self.matches(other.host)
        return self.wildcard and (other.host == self.host or other.host.endswith("." + self.host))

    def overlaps(self, other: HostPattern) -> bool:
        """Say whether some (host, port) belongs to both sets."""
        if None not in (self.port, other.port) and self.port != other.port:
            return False
        one, two = replace(self, port=None), replace(other, port=None)
        return one.covers(two) or two.covers(one)

    def __str__(self) -> str:
        return _render(f"*.{self.host}" if self.wildcard else self.host, self.network, self.port)


@dataclass(frozen=True, slots=True)
class AddressRule:
    """Lets an allowed name, or a literal, reach addresses that are otherwise refused."""

    network: IPNetwork
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> AddressRule:
        """Read `address`, `address:port`, `network/length` or `network/length:port`.

        Raises UsageError.
        """
        try:
            host, port = _split_port(text)
            network = _parse_network(host)
            if network is None:
                raise HostNameError("it is not an IP address or a network")
        except HostNameError as error:
            help_text = "Write an address or a network, such as 127.0.0.1:8443 or 10.1.0.0/16"
            raise UsageError(f"read the address rule {text!r}", str(error), help_text) from error
        return cls(network, port)

    def matches(self, address: IPAddress, port: int) -> bool:
        """Say whether the rule names this address and port."""
        return self.port in (None, port) and address in self.network

    def __str__(self) -> str:
        return _render(str(self.network), self.network, self.port)


# Reading patterns.


def parse_public_host(text: str) -> HostPattern:
    """Read a pattern of hosts on the internet: what a plain list of hosts may hold.

    Raises UsageError, also for an internal address, which only an address rule names.
    """
    pattern = HostPattern.parse(text)
    label = special_range(pattern.network.network_address) if pattern.network is not None else ""
    if label:
        raise UsageError(
            f"allow the host {text!r}",
            f"it is not a public address ({label})",
            f'Write it as an address rule: allow_addresses = ["{text}"]',
        )
    return pattern


def _split_port(text: str) -> tuple[str, int | None]:
    if any(sign in text for sign in ("://", "@", "?", "#", "\\")):
        raise HostNameError("it is a URL, not a host")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or ":" not in host or (rest and not rest.startswith(":")):
            raise HostNameError("only an IPv6 address or network stands in brackets")
        return host, parse_port(rest[1:]) if rest else None
    if text.count(":") != 1:
        return text, None
    host, _, port = text.partition(":")
    return host, parse_port(port)


def _parse_network(host: str) -> IPNetwork | None:
    if "/" not in host and parse_address(host) is None:
        return None
    try:
        network = ipaddress.ip_network(host)
    except ValueError as error:
        raise HostNameError("it is not a network with zeros after its prefix") from error
    if network.prefixlen < MIN_PREFIX[network.version]:
        raise HostNameError(f"it is wider than /{MIN_PREFIX[network.version]}")
    return network


def _check_wildcard(suffix: str) -> str:
    labels = suffix.split(".")
    registry = len(labels) == 2 and len(labels[1]) == 2 and labels[0] in _REGISTRY_LABELS
    if len(labels) < 2 or registry:
        raise HostNameError("the wildcard would span everybody's domains below a registry")
    return suffix


def to_ascii(host: str) -> str:
    """Return the canonical form of a host name as a person writes it. Raises HostNameError."""
    if "*" in host:
        raise HostNameError("a * stands only for whole labels at the start, as in *.example.com")
    if host.isascii():
        return parse_hostname(host)
    if _DEVIATING & set(host) or unicodedata.normalize("NFKC", host).lower() != host.lower():
        raise HostNameError("programs disagree on its encoding; write it in its xn-- form")
    try:
        return parse_hostname(host.lower().encode("idna").decode("ascii"))
    except UnicodeError as error:
        raise HostNameError("it is no internationalized domain name") from error


def contains(outer: IPNetwork | None, inner: IPNetwork | None) -> bool:
    """Say whether `inner` is a part of `outer`; no network is a part of none."""
    if isinstance(outer, ipaddress.IPv4Network) and isinstance(inner, ipaddress.IPv4Network):
        return inner.subnet_of(outer)
    if isinstance(outer, ipaddress.IPv6Network) and isinstance(inner, ipaddress.IPv6Network):
        return inner.subnet_of(outer)
    return False


def _render(host: str, network: IPNetwork | None, port: int | None) -> str:
    if network is not None and network.prefixlen == network.max_prefixlen:
        host = str(network.network_address)
    if port is None:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
