"""A secret of one sandbox: what the guest sees instead of it, where it may go, and what it was before."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from taskvm.egress.hostpattern import HostPattern
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Place, Secret
from taskvm.errors import UsageError

PLACEHOLDER_ENTROPY = 24  # bytes: not to be guessed, and never a part of another text by chance
MAX_FORMER = 16  # values that a rotated secret had, still looked for

Scheme = Literal["http", "https"]
RandomBytes = Callable[[int], bytes]

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class BoundSecret:
    """A secret, its placeholder in one sandbox, and its hosts as patterns.

    `former` are values that it had before, `former_hosts` patterns; `revoked`: it goes nowhere any more.
    """

    secret: Secret
    placeholder: str
    hosts: tuple[HostPattern, ...]
    former: tuple[bytes, ...] = field(default=(), repr=False)
    former_hosts: tuple[HostPattern, ...] = ()
    revoked: bool = False

    def may_go_to(self, scheme: Scheme, host: str, port: int) -> bool:
        """Say whether the value may be sent to this origin: in clear only to a named port, and not TLS's own."""
        return not self.revoked and any(
            pattern.matches(host, port) and (scheme == "https" or pattern.port not in (None, 443))
            for pattern in self.hosts
        )

    def is_known_to(self, host: str, port: int) -> bool:
        """Say whether the host may have seen a value of it, now or before."""
        return any(pattern.matches(host, port) for pattern in (*self.hosts, *self.former_hosts))

    def is_of(self, host: str, port: int) -> bool:
        """Say whether the host is one of its hosts, also when it is revoked."""
        return any(pattern.matches(host, port) for pattern in self.hosts)

    def is_for(self, place: Place) -> bool:
        """Say whether the value may stand there."""
        return place in self.secret.places

    @property
    def values(self) -> tuple[bytes, ...]:
        """Its value and its former ones; not those that are a part of the present one."""
        value = self.secret.reveal().encode()
        return (value, *(old for old in self.former if old not in value))

    def rotated(self, secret: Secret, policy: Policy) -> BoundSecret:
        """Return it with what `secret` says, under the same placeholder. Raises UsageError as `bind_secret`."""
        hosts = _check_hosts(policy, secret)
        before = tuple(dict.fromkeys((*self.hosts, *self.former_hosts)))
        former = tuple(host for host in before if host not in hosts)
        return replace(self.renewed(secret), hosts=hosts, former_hosts=former, revoked=False)

    def renewed(self, secret: Secret) -> BoundSecret:
        """Return it with another value; its value of now is a former one then."""
        old = self.secret.reveal().encode()
        former = self.former if old == secret.reveal().encode() else (old, *self.former)
        return replace(self, secret=secret, former=former[:MAX_FORMER])

    def withdrawn(self) -> BoundSecret:
        """Return it revoked."""
        return replace(self, revoked=True)


def bind_secrets(
    policy: Policy, secrets: Iterable[Secret], random_bytes: RandomBytes
) -> tuple[BoundSecret, ...]:
    """Give each secret its placeholder for one sandbox. Raises UsageError as `bind_secret`."""
    bound: list[BoundSecret] = []
    for secret in secrets:
        if any(other.secret.name == secret.name for other in bound):
            raise UsageError(f"use the secret {secret.name!r}", "two secrets have this name")
        bound.append(bind_secret(policy, secret, random_bytes))
    return tuple(bound)


def bind_secret(policy: Policy, secret: Secret, random_bytes: RandomBytes) -> BoundSecret:
    """Give a secret its placeholder.

    `random_bytes` is a cryptographic source, such as `os.urandom`. Raises UsageError when a host of
    the secret is not within the allowed hosts.
    """
    hosts = _check_hosts(policy, secret)
    return BoundSecret(secret, _make_placeholder(secret, random_bytes), hosts)


def _make_placeholder(secret: Secret, random_bytes: RandomBytes) -> str:
    if not secret.shape:
        token = random_bytes(PLACEHOLDER_ENTROPY).hex()
        return f"taskvm_secret_{secret.name}_{token}"
    stars = secret.shape.count("*")
    # Far more bits than the letters need, so that the remainder's bias does not matter.
    number = int.from_bytes(random_bytes(2 * stars), "big")
    text = ""
    for sign in secret.shape:
        if sign == "*":
            number, index = divmod(number, len(_LETTERS))
            sign = _LETTERS[index]
        text += sign
    return text


def _check_hosts(policy: Policy, secret: Secret) -> tuple[HostPattern, ...]:
    patterns = tuple(HostPattern.parse(host) for host in secret.hosts)
    for pattern in patterns:
        if not policy.covers(pattern):
            raise UsageError(
                f"use the secret {secret.name!r}",
                f"its host {pattern} is not within the allowed hosts",
                f'Add "{pattern}" to the allowed hosts, or take it from the secret',
            )
    return patterns
