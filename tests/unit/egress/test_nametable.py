"""taskvm.egress.nametable: what a person writes about names, checked before anything starts."""

from ipaddress import ip_address

import pytest

from taskvm.egress.nametable import MAX_ADDRESSES, parse_table
from taskvm.errors import UsageError


def test_a_name_has_its_addresses_in_their_order() -> None:
    table = parse_table({"API.test.": "192.0.2.9,2001:db8::1,192.0.2.1", "b.test": "::1"})

    assert table == {
        "api.test": [ip_address("192.0.2.9"), ip_address("2001:db8::1"), ip_address("192.0.2.1")],
        "b.test": [ip_address("::1")],
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"a.test": "b.test"},
        {"a.test": ""},
        {"a.test": "192.0.2.7,"},
        {"a.test": "192.0.2.7, 192.0.2.8"},
        {"a.test": ",".join(["192.0.2.7"] * (MAX_ADDRESSES + 1))},
        {"a b": "192.0.2.7"},
        {"127.1": "192.0.2.7"},
        {"a.test": "192.0.2.7", "A.test.": "192.0.2.8"},
    ],
    ids=str,
)
def test_an_entry_that_means_nothing_is_refused(wrong: dict[str, str]) -> None:
    """Also two of one name, of which one would not be used."""
    with pytest.raises(UsageError, match="table of names"):
        parse_table(wrong)
