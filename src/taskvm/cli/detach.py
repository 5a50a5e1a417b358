"""The keys that leave a command running (`--detach-keys`), found in what is typed. Pure."""

from __future__ import annotations

from taskvm import UsageError

DEFAULT_KEYS = "ctrl-p,ctrl-q"


class DetachKeys:
    """Looks for a sequence of keys. What begins like it is held back until it is something else."""

    def __init__(self, sequence: bytes) -> None:
        self._sequence = sequence
        self._matched = 0

    @classmethod
    def parse(cls, text: str) -> DetachKeys:
        """Read keys such as `ctrl-p,ctrl-q` or `ctrl-a,d`; an empty text is no keys. Raises UsageError."""
        return cls(bytes(_key(part, text) for part in text.split(",")) if text else b"")

    @property
    def holds(self) -> bool:
        """Whether keys are held back."""
        return self._matched > 0

    def release(self) -> bytes:
        """Return the keys that are held back: who typed them meant them for the command."""
        held, self._matched = self._sequence[: self._matched], 0
        return held

    def feed(self, typed: bytes) -> tuple[bytes, bool]:
        """Return what of `typed` is for the command, and whether the sequence was typed to its end."""
        if not self._sequence:
            return typed, False
        passed = bytearray()
        for key in typed:
            if key != self._sequence[self._matched]:
                passed += self._sequence[: self._matched]
                self._matched = 0
            if key == self._sequence[self._matched]:
                self._matched += 1
                if self._matched == len(self._sequence):
                    self._matched = 0
                    return bytes(passed), True
            else:
                passed.append(key)
        return bytes(passed), False


def _key(part: str, text: str) -> int:
    name = part.strip()
    control = name.lower().removeprefix("ctrl-")
    if len(name) == 1 and name.isascii():
        return ord(name)
    if (
        control != name.lower()
        and len(control) == 1
        and control in "abcdefghijklmnopqrstuvwxyz@[\\]^_"
    ):
        return ord(control.upper()) & 0x1F  # as terminals have it since ASCII
    raise UsageError(
        f"use --detach-keys {text}",
        f"{part!r} is not a key",
        "Write keys like ctrl-p,ctrl-q, or an empty text for none",
    )
