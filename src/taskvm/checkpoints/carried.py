"""What a saved guest's memory holds of its host's side, so that whoever runs it next goes on where this host stopped.

Running programs hold placeholders, addresses of names and the certificate that they trust; the agent holds open
streams, the kernel nodes of mounts. Secrets' values, mounts' contents, policy and environment are not here: they are
given again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from taskvm.egress.boundsecret import BoundSecret
from taskvm.errors import UsageError
from taskvm.fs.hostdir import Mode
from taskvm.fs.hostpaths import Seen
from taskvm.fs.provider import Provider
from taskvm.net.gateway import GatewayState
from taskvm.review.mounted import ReviewMount, mode_of
from taskvm.vm.control import ControlState


class CarriedMount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mount at rest: `state` is of `FsServer.export_mounts`, the others are of a review's `ReviewMount`."""

    mode: Mode
    state: bytes
    since_ns: int = 0
    applied: list[tuple[bytes, Seen]] = []

    @classmethod
    def of(cls, provider: Provider, state: bytes, review: ReviewMount | None) -> CarriedMount:
        """Return the mount of `provider`, which is a `review` or not."""
        if review is None:
            return cls(mode=mode_of(provider), state=state)
        # JSON has no place for a name that is not UTF-8.
        applied = [(os.fsencode(path), seen) for path, seen in review.applied.items()]
        return cls(mode="review", state=state, since_ns=review.since_ns, applied=applied)

    def dated(self, review: ReviewMount) -> ReviewMount:
        """Return `review`, just made, as the one that goes on here."""
        applied = {os.fsdecode(path): seen for path, seen in self.applied}
        return replace(review, since_ns=self.since_ns, applied=applied)


class Carried(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The host's side of a guest at rest. `authority` is a private key with its certificate, in PEM, `mounts` are by
    path.
    """

    control: ControlState
    gateway: GatewayState
    placeholders: dict[str, str]
    authority: str
    mounts: dict[str, CarriedMount]

    def __repr__(self) -> str:
        return "Carried(…)"  # it holds a key

    def bind(self, bound: Sequence[BoundSecret]) -> tuple[BoundSecret, ...]:
        """Return the secrets under the placeholders that the guest's programs know them by."""
        known = self.placeholders
        return tuple(
            replace(item, placeholder=known.get(item.secret.name, item.placeholder))
            for item in bound
        )

    def check_mounts(self, given: Mapping[str, Provider]) -> None:
        """Raise UsageError unless `given` are the mounts that the guest has, if it has any, each in its mode.

        What was written to directly may be read only from now on: its programs get EROFS.
        """
        if not self.mounts:
            return  # nothing that a new one could hide
        operation = "go on with the mounts of a saved sandbox"
        if missing := sorted(self.mounts.keys() - given.keys()):
            raise UsageError(
                operation, f"{', '.join(missing)} is missing", "Mount there what was mounted there"
            )
        if extra := sorted(given.keys() - self.mounts.keys()):
            raise UsageError(
                operation,
                f"it had nothing at {', '.join(extra)}",
                "Leave it out: its mounts stay as they are",
            )
        for path, mount in self.mounts.items():
            mode = mode_of(given[path])
            if mode != mount.mode and (mount.mode, mode) != ("direct", "ro"):
                raise UsageError(
                    operation, f"{path} was mounted {mount.mode}, not {mode}", "Mount it as it was"
                )
