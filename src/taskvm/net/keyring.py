"""The secrets of one sandbox as they are now: added, rotated, renewed and revoked while it runs.

What decides takes `injector` at the moment of deciding, and never keeps it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterable, Mapping

from taskvm.egress.boundsecret import BoundSecret, bind_secret
from taskvm.egress.injection import InjectionRefused, Injector
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.errors import UsageError
from taskvm.net.consulting import Consulting

RENEW_TIMEOUT_S = 60.0
MAX_SOURCES = 4  # that are asked at once: one, and some that did not answer in time


class Keyring:
    """Holds secrets under their names. A revoked one stays known: its placeholder must go nowhere."""

    def __init__(self, secrets: Iterable[BoundSecret] = ()) -> None:
        self._secrets = {bound.secret.name: bound for bound in secrets}
        self._fresh_since = dict.fromkeys(self._secrets, time.monotonic())
        self._renewing = asyncio.Lock()
        self._sources = Consulting(MAX_SOURCES)
        self.injector = Injector(self._secrets.values())

    @property
    def placeholders(self) -> Mapping[str, str]:
        """What the guest sees instead of each secret that is not revoked."""
        return {
            name: bound.placeholder for name, bound in self._secrets.items() if not bound.revoked
        }

    def usable(self, policy: Policy) -> tuple[Secret, ...]:
        """Return the secrets as they are now: not revoked, and for hosts that `policy` still allows."""
        return tuple(
            bound.secret
            for bound in self._secrets.values()
            if not bound.revoked and all(map(policy.covers, bound.hosts))
        )

    def find(self, name: str) -> BoundSecret | None:
        """Return a secret as it is now, also when it is revoked."""
        return self._secrets.get(name)

    def put(self, policy: Policy, secret: Secret) -> str:
        """Add a secret, or give the one of this name another value; return its placeholder.

        Raises UsageError when one of its hosts is not allowed.
        """
        known = self._secrets.get(secret.name)
        bound = (
            bind_secret(policy, secret, os.urandom)
            if known is None
            else known.rotated(secret, policy)
        )
        self._set(bound)
        return bound.placeholder

    def revoke(self, name: str) -> BoundSecret:
        """Let a secret go nowhere from now on, and return it. Raises UsageError for one that is not there."""
        if name not in self._secrets:
            raise UsageError(
                f"revoke the secret {name!r}", "the sandbox has no secret of this name"
            )
        withdrawn = self._secrets[name].withdrawn()
        self._set(withdrawn)
        return withdrawn

    async def renew(self, names: Iterable[str]) -> None:
        """Ask the sources of those that are too old. Raises InjectionRefused when one does not answer."""
        for name in sorted(names):
            if self._is_old(name):
                async with self._renewing:
                    if self._is_old(name):  # not renewed while we waited
                        await self._renew(name)

    def close(self) -> None:
        """Ask no source any more."""
        self._sources.close()

    def _is_old(self, name: str) -> bool:
        refresh_s = self._secrets[name].secret.refresh_s
        return refresh_s is not None and time.monotonic() - self._fresh_since[name] >= refresh_s

    async def _renew(self, name: str) -> None:
        before = self._secrets[name]
        secret = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RENEW_TIMEOUT_S):
                secret = await self._sources.call(_ask_source, before.secret)
        if secret is None:
            raise InjectionRefused(
                name, "the secret's source gave no value", "Ask the owner of this sandbox"
            )
        now = self._secrets[name]
        if now.secret is before.secret and not now.revoked:  # else somebody has said otherwise
            self._set(now.renewed(secret))

    def _set(self, bound: BoundSecret) -> None:
        self._secrets[bound.secret.name] = bound
        self._fresh_since[bound.secret.name] = time.monotonic()
        self.injector = Injector(self._secrets.values())


def _ask_source(secret: Secret) -> Secret | None:
    try:
        return secret.renewed()
    except Exception:  # noqa: BLE001 - a callback of the user's: its words may hold the value
        return None
