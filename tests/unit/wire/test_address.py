"""Special addresses: ours is at least as strict as Python's registry, in every version."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from taskvm.wire.address import embedded_ipv4, special_range


@pytest.mark.parametrize(
    ("address", "label"),
    [
        ("0.0.0.0", "this network"), ("127.0.0.2", "loopback"), ("10.1.2.3", "private"),
        ("172.31.255.255", "private"), ("192.168.0.1", "private"), ("100.100.100.200", "carrier-grade NAT"),
        ("169.254.169.254", "link-local and metadata"), ("168.63.129.16", "metadata"),
        ("192.0.0.192", "protocol assignments and metadata"), ("198.19.255.255", "benchmark"),
        ("224.0.0.251", "multicast"), ("255.255.255.255", "reserved"), ("::", "unspecified"), ("::1", "loopback"),
        ("::ffff:8.8.8.8", "IPv4-mapped"), ("::808:808", "IPv4-compatible"), ("64:ff9b::808:808", "NAT64"),
        ("2002:808:808::1", "6to4"), ("2001:0:1::1", "Teredo"), ("fd00:ec2::254", "private"),
        ("fe80::1", "link-local"), ("fec0::1", "site-local"), ("ff02::fb", "multicast"), ("4000::1", "unassigned"),
    ],
)  # fmt: skip
def test_special_addresses_are_named(address: str, label: str) -> None:
    assert special_range(ipaddress.ip_address(address)) == label


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1"]
)
def test_public_addresses_are_ordinary(address: str) -> None:
    assert special_range(ipaddress.ip_address(address)) == ""
    assert embedded_ipv4(ipaddress.ip_address(address)) is None


@given(st.ip_addresses())
def test_what_python_calls_special_is_special(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    is_special = bool(special_range(address))

    assert is_special or (address.is_global and not address.is_multicast)


@given(st.ip_addresses(v=4))
def test_an_embedded_address_is_found_in_every_transition_format(
    inner: ipaddress.IPv4Address,
) -> None:
    assume(int(inner) > 1)
    forms = [
        (0xFFFF << 32) + int(inner),
        int(inner),
        (0x64FF9B << 96) + int(inner),
        (0x2002 << 112) + (int(inner) << 80),
        (0x20010000 << 96) + (int(inner) ^ 0xFFFF_FFFF),
    ]

    for form in forms:
        address = ipaddress.IPv6Address(form)
        assert special_range(address)
        assert embedded_ipv4(address) == inner
