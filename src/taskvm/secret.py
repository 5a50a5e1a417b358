"""A secret: a value the guest never sees, and the hosts and header names that it may be sent to.

Rule 1: the value leaves through `reveal()` only. Not through repr, str, format, pickle, copy, vars
        or an error's text.
Rule 2: where it may go is part of the secret: hosts (patterns, read in the policy layer) and header
        names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NoReturn

from taskvm.errors import UsageError

DEFAULT_HEADERS = (
    "Authorization",
    "X-API-Key",
    "Api-Key",
    "X-Auth-Token",
    "Private-Token",
    "X-Goog-Api-Key",
)
MAX_VALUE = 16 * 1024  # bytes; servers refuse longer header lines

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}\Z")
# Hop-by-hop, framing and routing headers: a secret there would go to the wrong reader or change the
# message.
_FORBIDDEN_HEADERS = frozenset(
    {
        "connection", "content-length", "expect", "host", "keep-alive", "proxy-authenticate",
        "proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip


class Secret:
    """A named value for some hosts. Immutable; equal only to itself."""

    __slots__ = ("_value", "headers", "hosts", "name")

    name: str
    hosts: tuple[str, ...]
    headers: tuple[str, ...]
    _value: str

    def __init__(
        self,
        name: str,
        value: str,
        *,
        hosts: Iterable[str],
        headers: Iterable[str] = DEFAULT_HEADERS,
    ) -> None:
        operation = f"declare the secret {name!r}"
        fields = {
            "name": _check_name(operation, name),
            "hosts": _check_list(operation, "hosts", hosts),
            "headers": _check_headers(operation, headers),
            "_value": _check_value(operation, value),
        }
        for field, content in fields.items():
            object.__setattr__(self, field, content)

    @classmethod
    def from_value(
        cls,
        name: str,
        value: str,
        *,
        hosts: Iterable[str],
        headers: Iterable[str] = DEFAULT_HEADERS,
    ) -> Secret:
        """Make a secret of a value that the program already has."""
        return cls(name, value, hosts=hosts, headers=headers)

    @classmethod
    def from_env(
        cls, name: str, *, hosts: Iterable[str], headers: Iterable[str] = DEFAULT_HEADERS
    ) -> Secret:
        """Read the environment variable `name`. Raises UsageError when it is unset or empty."""
        value = os.environ.get(name, "")
        if not value:
            raise UsageError(
                f"read the secret {name!r} from the environment",
                f"the variable {name} is not set" if name not in os.environ else f"{name} is empty",
                "Set it in the environment of this program",
            )
        return cls(name, value, hosts=hosts, headers=headers)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str,
        hosts: Iterable[str],
        headers: Iterable[str] = DEFAULT_HEADERS,
    ) -> Secret:
        """Read a file that holds the value and nothing else; one newline at its end is dropped."""
        operation = f"read the secret {name!r} from {os.fspath(path)}"
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_VALUE + 2)
        except OSError as error:
            raise UsageError(operation, error.strerror or "it cannot be read") from error
        try:
            value = data.decode("utf-8")
        except UnicodeDecodeError:
            # `from None`: the codec's error carries the bytes.
            raise UsageError(operation, "the file is not UTF-8 text") from None
        return cls(name, value.removesuffix("\n").removesuffix("\r"), hosts=hosts, headers=headers)

    def reveal(self) -> str:
        """Return the value.

        Whoever calls this keeps it out of the guest, the logs and every message.
        """
        return self._value

    def __repr__(self) -> str:
        return f"Secret({self.name!r}, hosts={list(self.hosts)!r})"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a Secret cannot be changed ({name})")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Secret cannot be changed ({name})")

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Secret is not pickled: read it again where it is needed")


def _check_name(operation: str, name: str) -> str:
    if not _NAME.match(name):
        raise UsageError(operation, "the name is not letters, digits and _ (64 at most)")
    return name


def _check_list(operation: str, field: str, items: Iterable[str]) -> tuple[str, ...]:
    listed = () if isinstance(items, str) else tuple(items)
    if not listed:
        raise UsageError(operation, f"{field} is not a list with at least one entry")
    return listed


def _check_headers(operation: str, headers: Iterable[str]) -> tuple[str, ...]:
    names = _check_list(operation, "headers", headers)
    for header in names:
        if not _HEADER.match(header):
            raise UsageError(operation, f"{header!r} is not a header name")
        if header.lower() in _FORBIDDEN_HEADERS:
            raise UsageError(operation, f"a secret is never sent in {header}")
    return names


def _check_value(operation: str, value: str) -> str:
    # A control character would end the header line, and with it the message (RFC 9110 section 5.5).
    if not value or any(ord(sign) < 0x20 or ord(sign) == 0x7F for sign in value):
        raise UsageError(operation, "the value is empty or has control characters")
    if value != value.strip() or len(value.encode("utf-8", "replace")) > MAX_VALUE:
        raise UsageError(operation, f"the value has outer spaces or more than {MAX_VALUE} bytes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(operation, "the value is not valid text") from None
    return value
