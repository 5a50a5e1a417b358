"""Listening addresses of the host that lead into the guest, for programs that block."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from taskvm.net import ingress as aio
from taskvm.sync.bridge import Bridge


class Forward:
    """A listening address of the host that leads to a port of the guest, until `close` or the sandbox's end.

    `host` and `port` are where it listens, `guest_port` where it leads; `str()` is `host:port`. What
    answers there is the untrusted guest: a browser that opens it runs the guest's pages. A thread of
    the engine's carries the connections.
    """

    def __init__(self, bridge: Bridge, forward: aio.Forward) -> None:
        self._bridge = bridge
        self._forward = forward
        self.host: str = forward.host
        self.port: int = forward.port
        self.guest_port: int = forward.guest_port

    def close(self) -> None:
        """Stop listening and break off the connections that are open. Idempotent."""
        self._bridge.release(self._forward.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __str__(self) -> str:
        return str(self._forward)
