"""The synthetic addresses of one sandbox: each name it may know gets its own, for its life.

So every connection tells which name it was made to. An address is never given to a second name: a
guest that caches one for an hour still means the same host.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

# Benchmark range (RFC 2544): no host on the internet has these, and our own policy refuses them.
SYNTHETIC_NETWORK = ipaddress.IPv4Network("198.18.0.0/15")
# The first addresses are left free: guests and people expect network, gateway and resolver there.
FIRST_OFFSET = 16
MAX_NAMES = 65_000


class SyntheticNames:
    """Canonical host names and their addresses. State: the names in the order they came."""

    def __init__(self, names: Iterable[str] = (), max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._names: list[str] = []
        self._addresses: dict[str, ipaddress.IPv4Address] = {}
        for name in names:
            self.address_of(name)

    def address_of(self, name: str) -> ipaddress.IPv4Address | None:
        """Return the address of `name`, giving it one at first; None when the table is full."""
        known = self._addresses.get(name)
        if known is not None or len(self._names) >= self._max_names:
            return known
        address = SYNTHETIC_NETWORK[FIRST_OFFSET + len(self._names)]
        self._names.append(name)
        self._addresses[name] = address
        return address

    def name_at(self, address: ipaddress.IPv4Address) -> str | None:
        """Return the name that was given `address`, or None."""
        position = int(address) - int(SYNTHETIC_NETWORK.network_address) - FIRST_OFFSET
        return self._names[position] if 0 <= position < len(self._names) else None

    def export(self) -> tuple[str, ...]:
        """Return what `SyntheticNames(...)` needs to give every name its address again."""
        return tuple(self._names)
