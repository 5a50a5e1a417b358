"""A person's table of names: host name → addresses, used instead of looking the name up. Pure.

Several addresses are separated by commas, as in curl's --resolve; they are tried in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from taskvm.errors import UsageError
from taskvm.wire.hostname import HostNameError, IPAddress, parse_address, parse_hostname

MAX_ADDRESSES = 8  # tried at most, of those that a name has


def parse_table(table: Mapping[str, str]) -> Mapping[str, Sequence[IPAddress]]:
    """Return the addresses by canonical host names.

    Raises UsageError for an entry that is not a host name and IP addresses, and for two of one name.
    """
    parsed: dict[str, Sequence[IPAddress]] = {}
    for name, text in table.items():
        operation = f"read the entry {name!r} = {text!r} of the table of names"
        addresses = _parse_addresses(operation, text)
        try:
            host = parse_hostname(name)
        except HostNameError as error:
            raise UsageError(operation, f"the name is refused: {error}", _FORM) from error
        if host in parsed:
            raise UsageError(operation, f"another one is for {host}", _FORM)
        parsed[host] = addresses
    return parsed


_FORM = "Write name=address, or name=address,address"


def _parse_addresses(operation: str, text: str) -> Sequence[IPAddress]:
    parts = text.split(",")
    addresses = [address for address in map(parse_address, parts) if address is not None]
    if len(addresses) < len(parts):
        raise UsageError(operation, "the second is not an IP address", _FORM)
    if len(addresses) > MAX_ADDRESSES:
        raise UsageError(operation, f"it has more than {MAX_ADDRESSES} addresses", _FORM)
    return addresses
