"""Hosts whose TLS is not intercepted, for programs that pin their server's certificate or key.

Rule 1: the owner names them when a sandbox starts: the guest must trust the world's authorities for
        them, which costs an emulated one a second for each program.
Rule 2: every request to them must be allowed, since none of them can be seen.
Rule 3: no secret is for such a host: there is nowhere to put it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from taskvm.egress.hostpattern import HostPattern
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.errors import UsageError


@dataclass(frozen=True, slots=True)
class Passthrough:
    """A set of host patterns; empty, everything is intercepted."""

    hosts: tuple[HostPattern, ...] = ()

    @classmethod
    def parse(
        cls, texts: Iterable[str], policy: Policy, secrets: Iterable[Secret] = ()
    ) -> Passthrough:
        """Read the patterns as a person writes them. Raises UsageError."""
        if isinstance(texts, str):
            raise UsageError("read passthrough", "it is one text", f"Write a list: [{texts!r}]")
        hosts = tuple(HostPattern.parse(text) for text in texts)
        for host in hosts:
            _check(host, policy, secrets)
        return cls(hosts)

    def names(self, host: str, port: int) -> bool:
        """Say whether TLS to a canonical host passes unread."""
        return any(pattern.matches(host, port) for pattern in self.hosts)

    def check_secret(self, secret: Secret) -> None:
        """Raise UsageError for a secret that is for one of these hosts."""
        for host in self.hosts:
            _check_secret(host, secret)

    def __bool__(self) -> bool:
        return bool(self.hosts)


NOTHING = Passthrough()


def _check(host: HostPattern, policy: Policy, secrets: Iterable[Secret]) -> None:
    operation = f"pass TLS to {host} through"
    if host.network is not None:
        raise UsageError(
            operation, "it is an address, which TLS does not name", "Write the server's name"
        )
    if not policy.covers(host):
        raise UsageError(
            operation,
            "it is not within the allowed hosts",
            f'Add "{host}" to the allowed hosts, or take it from passthrough',
        )
    for secret in secrets:
        _check_secret(host, secret)


def _check_secret(host: HostPattern, secret: Secret) -> None:
    for pattern in map(HostPattern.parse, secret.hosts):
        if pattern.overlaps(host):
            raise UsageError(
                f"pass TLS to {host} through",
                f"the secret {secret.name!r} is for {pattern}",
                "What is not intercepted can carry no secret: take the host from one of the two",
            )
