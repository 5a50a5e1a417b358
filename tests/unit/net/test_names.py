"""Synthetic addresses: one for a name, never for two, and the same after a checkpoint."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from taskvm.net.names import MAX_NAMES, SYNTHETIC_NETWORK, SyntheticNames


@given(st.lists(st.text(max_size=5)))
def test_names_and_addresses_map_both_ways(wanted: list[str]) -> None:
    names = SyntheticNames()
    addresses = {name: names.address_of(name) for name in wanted}

    assert len(set(addresses.values())) == len(set(wanted))
    for name, address in addresses.items():
        assert address is not None
        assert address in SYNTHETIC_NETWORK
        assert names.name_at(address) == name
    again = SyntheticNames(names.export())
    assert {name: again.address_of(name) for name in addresses} == addresses


def test_addresses_that_were_not_given_have_no_name() -> None:
    names = SyntheticNames(["a.test"])

    for text in ("198.18.0.0", "198.18.0.15", "198.18.0.17", "198.17.255.255", "198.20.0.1"):
        assert names.name_at(ipaddress.IPv4Address(text)) is None


def test_the_whole_table_fits_the_network() -> None:
    names = SyntheticNames(str(number) for number in range(MAX_NAMES + 1))

    assert len(names.export()) == MAX_NAMES
    assert names.address_of("one more") is None
    assert names.address_of("0") == ipaddress.IPv4Address("198.18.0.16")
