"""IP addresses that are not simply hosts on the internet, and the IPv4 ones inside IPv6 ones.

The tables are the IANA special-purpose registries (RFC 6890 and its updates; read in 2026) plus the
two metadata services that clouds run on public addresses. Written out, because
`ipaddress.is_global` changes with the Python version.
"""

from __future__ import annotations

import ipaddress

from taskvm.wire.hostname import IPAddress

_SPECIAL_V4 = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "carrier-grade NAT",
    "127.0.0.0/8": "loopback",
    "168.63.129.16/32": "metadata",  # Azure's WireServer
    "169.254.0.0/16": "link-local and metadata",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "protocol assignments and metadata",  # 192.0.0.192 is Oracle's
    "192.0.2.0/24": "documentation",
    "192.31.196.0/24": "AS112",
    "192.52.193.0/24": "AMT",
    "192.88.99.0/24": "6to4 relay",
    "192.168.0.0/16": "private",
    "192.175.48.0/24": "AS112",
    "198.18.0.0/15": "benchmark",  # also where our own synthetic addresses are
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
    "255.255.255.255/32": "broadcast",
}
_SPECIAL_V6 = {
    "::/128": "unspecified",
    "::1/128": "loopback",
    "::ffff:0:0/96": "IPv4-mapped",
    "::/96": "IPv4-compatible",
    "64:ff9b::/96": "NAT64",
    "64:ff9b:1::/48": "NAT64",
    "100::/64": "discard",
    "2001::/32": "Teredo",
    "2001::/23": "protocol assignments",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "2620:4f:8000::/48": "AS112",
    "3fff::/20": "documentation",
    "5f00::/16": "segment routing",
    "fc00::/7": "private",  # fd00:ec2::254 is Amazon's metadata service
    "fe80::/10": "link-local",
    "fec0::/10": "site-local",
    "ff00::/8": "multicast",
}
# Outside 2000::/3 nothing is assigned as global unicast (RFC 4291 section 2.4).
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")

_TABLE_V4 = [(ipaddress.IPv4Network(net), label) for net, label in _SPECIAL_V4.items()]
_TABLE_V6 = [(ipaddress.IPv6Network(net), label) for net, label in _SPECIAL_V6.items()]

# (prefix, position of the IPv4 address counted in bits from the right, XOR mask)
_EMBEDDED = [
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0, 0),
    (ipaddress.IPv6Network("::/96"), 0, 0),
    (ipaddress.IPv6Network("64:ff9b::/96"), 0, 0),
    (ipaddress.IPv6Network("2002::/16"), 80, 0),
    (ipaddress.IPv6Network("2001::/32"), 0, 0xFFFF_FFFF),  # RFC 4380 section 4: obfuscated
]


def special_range(address: IPAddress) -> str:
    """Return what kind of special address this is, or "" for an ordinary public one."""
    if isinstance(address, ipaddress.IPv4Address):
        return next((label for net, label in _TABLE_V4 if address in net), "")
    label = next((label for net, label in _TABLE_V6 if address in net), "")
    return label or ("" if address in _GLOBAL_V6 else "unassigned")


def embedded_ipv4(address: IPAddress) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that a transition mechanism sends the packets to, or None."""
    if isinstance(address, ipaddress.IPv4Address) or int(address) <= 1:
        return None  # :: and ::1 are no IPv4-compatible addresses (RFC 4291 section 2.5.5.1)
    for net, shift, mask in _EMBEDDED:
        if address in net:
            return ipaddress.IPv4Address(((int(address) >> shift) & 0xFFFF_FFFF) ^ mask)
    return None
