"""Looking up names with the host's own resolver and a person's table."""

from __future__ import annotations

import ipaddress
import threading

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm.errors import UpstreamError, UsageError
from taskvm.net import resolver as resolver_module
from taskvm.net.resolver import HostResolver, MappedResolver


async def test_the_hosts_own_names_are_found() -> None:
    resolver = HostResolver()

    found = await resolver.resolve("localhost")

    assert all(address.is_loopback for address in found)
    assert len(set(found)) == len(found) > 0
    resolver.close()


@pytest.mark.parametrize("name", ["nothing.invalid", "a" * 64 + ".invalid"])
async def test_a_name_without_an_address_is_an_upstream_error(name: str) -> None:
    resolver = HostResolver()

    with pytest.raises(UpstreamError, match=f"look up {name}"):
        await resolver.resolve(name)
    resolver.close()


async def test_a_resolver_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(resolver_module, "_lookup", lambda host: release.wait(timeout=PATIENCE_S))
    resolver = HostResolver(timeout_s=0.05)

    with pytest.raises(UpstreamError, match="in time"):
        await resolver.resolve("slow.test")
    release.set()
    resolver.close()


async def test_a_table_comes_first_and_its_entries_are_checked() -> None:
    resolver = HostResolver()
    mapped = MappedResolver({"API.test.": "192.0.2.7"}, resolver)

    assert await mapped.resolve("api.test") == [ipaddress.ip_address("192.0.2.7")]
    assert (await mapped.resolve("localhost"))[0].is_loopback
    with pytest.raises(UsageError, match="table of names"):
        MappedResolver({"a.test": "b.test"}, resolver)
    resolver.close()
