"""Looking up names, on the host, after the policy has allowed them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from taskvm.egress.nametable import parse_table
from taskvm.errors import UpstreamError
from taskvm.wire.hostname import IPAddress, parse_address

LOOKUP_TIMEOUT_S = 10.0
# getaddrinfo blocks its thread for as long as the host's resolver likes; more lookups wait.
LOOKUP_THREADS = 8


class Resolver(Protocol):
    """Turns a canonical host name into its addresses."""

    async def resolve(self, host: str) -> Sequence[IPAddress]:
        """Return at least one address. Raises UpstreamError."""


class HostResolver:
    """The host's own resolver: /etc/hosts, DNS and what else nsswitch.conf says."""

    def __init__(self, timeout_s: float = LOOKUP_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="taskvm-resolver")

    async def resolve(self, host: str) -> Sequence[IPAddress]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await loop.run_in_executor(self._threads, _lookup, host)
        except TimeoutError as error:
            raise UpstreamError(f"look up {host}", "the resolver did not answer in time") from error
        except (OSError, UnicodeError) as error:
            raise UpstreamError(
                f"look up {host}", "the name does not exist or has no address"
            ) from error
        if not found:
            raise UpstreamError(f"look up {host}", "the name has no address")
        return found

    def close(self) -> None:
        """Let the threads end; a lookup under way is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class MappedResolver:
    """A person's table of names before another resolver.

    The policy judges its addresses like any others.
    """

    def __init__(self, table: Mapping[str, str], others: Resolver) -> None:
        """Raises UsageError as `parse_table`."""
        self._table = parse_table(table)
        self._others = others

    async def resolve(self, host: str) -> Sequence[IPAddress]:
        return self._table.get(host) or await self._others.resolve(host)


def _lookup(host: str) -> list[IPAddress]:
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    texts = dict.fromkeys(str(answer[4][0]) for answer in answers)  # unique, in the host's order
    # An address with a zone (fe80::1%eth0) is link-local: parse_address drops it.
    return [address for address in map(parse_address, texts) if address is not None]
