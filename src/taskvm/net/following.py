"""A body's filter that follows the secrets of its sandbox: they change while a long body streams."""

from __future__ import annotations

from collections.abc import Callable

from taskvm.egress.injection import Injector
from taskvm.egress.replacing import Replacer
from taskvm.net.keyring import Keyring


class Following:
    """Filters by what `make` returns (None: nothing is replaced) for the secrets as they are at each piece."""

    def __init__(self, keyring: Keyring, make: Callable[[Injector], Replacer | None]) -> None:
        self._keyring = keyring
        self._make = make
        self._injector = keyring.injector
        self._replacer = make(self._injector)

    def feed(self, data: bytes) -> bytes:
        """Return what is sure of the body after another piece of it. Raises what a replacement raises."""
        held = self._follow()
        return held + data if self._replacer is None else self._replacer.feed(held + data)

    def finish(self) -> bytes:
        """Return the rest."""
        held = self._follow()
        return (
            held if self._replacer is None else self._replacer.feed(held) + self._replacer.finish()
        )

    def _follow(self) -> bytes:
        """Take up the secrets as they are now; return what was held back under the former ones."""
        if self._injector is self._keyring.injector:
            return b""
        held = b"" if self._replacer is None else self._replacer.release()
        self._injector = self._keyring.injector
        self._replacer = self._make(self._injector)
        return held
