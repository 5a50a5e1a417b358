"""What a saved guest's memory holds of its host's side, so that whoever runs it next goes on where this host stopped.

Running programs hold placeholders, addresses of names and the certificate that they trust; the agent holds open
streams. Secrets' values, mounts' contents, policy and environment are not here: they are given again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from taskvm.boundsecret import BoundSecret
from taskvm.net.gateway import GatewayState
from taskvm.vm.control import ControlState


class Carried(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The host's side of a guest at rest. `authority` is a private key with its certificate, in PEM."""

    control: ControlState
    gateway: GatewayState
    placeholders: dict[str, str]
    authority: str

    def __repr__(self) -> str:
        return "Carried(…)"  # it holds a key

    def bind(self, bound: Sequence[BoundSecret]) -> tuple[BoundSecret, ...]:
        """Return the secrets under the placeholders that the guest's programs know them by."""
        known = self.placeholders
        return tuple(
            replace(item, placeholder=known.get(item.secret.name, item.placeholder))
            for item in bound
        )
