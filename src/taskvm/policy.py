"""What may leave a sandbox: patterns of host names and addresses, and the decisions made from them.

Rule 1: nothing is allowed that no rule names; an empty policy denies all.
Rule 2: a name is judged before it is looked up (`decide_name`), and each address it turns out to
        have before it is connected to (`decide_address`). Both must allow.
Rule 3: internal, loopback, metadata and other special addresses are refused whatever the name says,
        unless an address rule names them. An IPv4 address inside an IPv6 one (NAT64, 6to4, …) must
        pass by itself as well.
Rule 4: a pattern matches whole labels, never substrings, and never more than one registered domain.
"""

from __future__ import annotations

import ipaddress
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from taskvm.errors import UsageError
from taskvm.wire.address import embedded_ipv4, special_range
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
class Decision:
    """What the policy says: `rule` is the text of what decided, `hint` what a person can do."""

    allowed: bool
    rule: str
    reason: str
    hint: str = ""


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
                return cls(_check_wildcard(_to_ascii(host[2:])), wildcard=True, port=port)
            return cls(_to_ascii(host), port=port)
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
            return _contains(self.network, other.network)
        if not other.wildcard:
            return self.matches(other.host)
        return self.wildcard and (other.host == self.host or other.host.endswith("." + self.host))

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


@dataclass(frozen=True, slots=True)
class Policy:
    """What one sandbox may reach. `Policy()` denies all."""

    allow: tuple[HostPattern, ...] = ()
    allow_addresses: tuple[AddressRule, ...] = ()

    @classmethod
    def parse(cls, allow: Iterable[str] = (), allow_addresses: Iterable[str] = ()) -> Policy:
        """Read a policy as a person writes it.

        Raises UsageError that names the rule it cannot read.
        """
        for argument, value in (("allow", allow), ("allow_addresses", allow_addresses)):
            if isinstance(value, str):
                raise UsageError(
                    f"read the policy's {argument}", "it is one text", f"Write a list: [{value!r}]"
                )
        return cls(
            tuple(_parse_allowed(text) for text in allow),
            tuple(AddressRule.parse(text) for text in allow_addresses),
        )

    def covers(self, pattern: HostPattern) -> bool:
        """Say whether all of `pattern` is allowed (by one rule)."""
        if any(allowed.covers(pattern) for allowed in self.allow):
            return True
        return pattern.network is not None and any(
            _contains(rule.network, pattern.network) and rule.port in (None, pattern.port)
            for rule in self.allow_addresses
        )


# Deciding.


def decide_name(policy: Policy, host: str, port: int | None) -> Decision:
    """Judge a canonical host name or IP literal before anything is looked up.

    `port` None asks for any port (DNS).
    """
    for pattern in policy.allow:
        if pattern.matches(host, port):
            return Decision(True, str(pattern), "the host is allowed")
    address = parse_address(host)
    if address is not None and port is not None:
        for rule in policy.allow_addresses:
            if rule.matches(address, port):
                return Decision(True, str(rule), "the address is allowed")
    if port is not None and any(pattern.matches(host) for pattern in policy.allow):
        return Decision(
            False, "port", "the host is allowed on another port only",
            f'Ask the owner of this sandbox to allow "{host}:{port}"',
        )  # fmt: skip
    return Decision(
        False, "default", "no rule allows this host",
        f'Ask the owner of this sandbox to allow "{host}"',
    )  # fmt: skip


def decide_address(policy: Policy, host: str, ip: IPAddress, port: int) -> Decision:
    """Judge one address that the allowed `host` has (or is). The reason never names the address."""
    by_rule = _named(policy, ip, port)
    label = special_range(ip)
    embedded = embedded_ipv4(ip)
    if label and by_rule is None:
        return _deny_special(label)
    if embedded is not None:
        inner = special_range(embedded)
        if inner and _named(policy, embedded, port) is None:
            return _deny_special(inner)
    if by_rule is not None:
        return Decision(True, str(by_rule), "an address rule allows it")
    return Decision(True, "public", f"{host} has a public address")


def _deny_special(label: str) -> Decision:
    return Decision(
        False,
        "special-address",
        f"the host's address is not a public one ({label})",
        "Ask the owner of this sandbox for an address rule",
    )


def _named(policy: Policy, ip: IPAddress, port: int) -> AddressRule | None:
    return next((rule for rule in policy.allow_addresses if rule.matches(ip, port)), None)


# Reading patterns.


def _parse_allowed(text: str) -> HostPattern:
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


def _to_ascii(host: str) -> str:
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


def _contains(outer: IPNetwork | None, inner: IPNetwork | None) -> bool:
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
