"""A review mount of one sandbox: which directory it shows, where its layer is, and what the host has done since."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field
from typing import Self

from taskvm.errors import UsageError
from taskvm.fs.hostdir import HostDir, Mode
from taskvm.fs.hostpaths import Seen
from taskvm.fs.patterns import Patterns
from taskvm.fs.provider import Provider
from taskvm.fs.shadow import Shadow
from taskvm.fs.wrapper import Wrapper

# Only root enters it. On the guest's disk, so that checkpoints hold it.
LAYERS = "/var/lib/taskvm/review"
# The clock that the kernel takes a file's times from (linux/time.h), a tick behind CLOCK_REALTIME.
_CLOCK_REALTIME_COARSE = 5


def clock_ns() -> int:
    """Return the time that the kernel would give a file now."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


def mode_of(provider: Provider) -> Mode:
    """Return how a mount of `provider` takes what the guest writes."""
    inner = provider
    while isinstance(inner, Wrapper):
        inner = inner.inner
    if isinstance(inner, HostDir) and inner.mode == "review":
        return "review"
    return "ro" if provider.readonly else "direct"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewMount:
    """A mount at `path` of the guest, numbered `id`. `applied` is what we have put on the host for it, `hidden` are
    the files of the host that the guest is not shown.

    Whatever the host changed after `since_ns`, the guest may have begun from something else.
    """

    id: int
    path: str
    provider: HostDir
    hidden: tuple[Patterns, ...] = ()
    since_ns: int = field(default_factory=clock_ns)
    applied: dict[str, Seen] = field(default_factory=dict)

    @classmethod
    def of(cls, number: int, path: str, provider: Provider) -> Self | None:
        """Return the review mount that `provider` is, None for another. Raises UsageError for what cannot be one."""
        hidden: list[Patterns] = []
        inner = provider
        while isinstance(inner, Wrapper):
            if isinstance(inner, Shadow):
                hidden.append(inner.patterns)
            inner = inner.inner
        if not isinstance(inner, HostDir) or inner.mode != "review":
            return None
        outer = provider
        while isinstance(outer, Wrapper):
            if not isinstance(outer, Shadow):
                raise UsageError(
                    f"mount {path} for review",
                    f"a {type(outer).__name__} changes what the guest sees of {inner.path}",
                    "Only Shadow may stand before a HostDir in the mode review",
                )
            if outer.private is not None:
                raise UsageError(
                    f"mount {path} for review",
                    f"a private layer would hide what the guest changes of {inner.path}",
                    "Hide the files without one: what the guest writes there is never applied",
                )
            outer = outer.inner
        return cls(id=number, path=path, provider=inner, hidden=tuple(hidden))

    @property
    def layer(self) -> str:
        """The directory of the guest that holds `lower`, `upper` and `work`."""
        return f"{LAYERS}/{hashlib.sha256(self.path.encode()).hexdigest()[:16]}"

    @property
    def upper(self) -> str:
        """The directory of the guest that holds what it changed."""
        return f"{self.layer}/upper"

    def has_changed(self, path: str, seen: Seen) -> bool:
        """Say whether the host has changed `path`, which is `seen` now, since the guest may have looked."""
        return seen.ctime_ns > self.since_ns and self.applied.get(path) != seen

    def hides(self, path: str) -> bool:
        """Say whether the guest is not shown what the host has at `path`."""
        names = tuple(os.fsencode(name) for name in path.split("/"))
        return any(patterns.may_hide(names) for patterns in self.hidden)
