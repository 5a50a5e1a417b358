"""A secret: a value the guest never sees, and the hosts and header names that it may be sent to.

Rule 1: the value leaves through `reveal()` only. Not through repr, str, format, pickle, copy, vars
        or an error's text.
Rule 2: where it may go is part of the secret: hosts (patterns, read in the policy layer), header
        names, and further places of a request only where they are named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Literal, NoReturn, TypedDict, Unpack

from taskvm.arguments import refuse_unknown
from taskvm.errors import UsageError

DEFAULT_HEADERS = (
    "Authorization",
    "X-API-Key",
    "Api-Key",
    "X-Auth-Token",
    "Private-Token",
    "X-Goog-Api-Key",
)
Place = Literal["query", "path", "body"]
PLACES: tuple[Place, ...] = ("query", "path", "body")
MAX_VALUE = 16 * 1024  # bytes; servers refuse longer header lines

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
# 62^16 is 95 bits: not to be guessed, and never a part of another text by chance.
MIN_RANDOM = 16
# Characters that no part of a request escapes, so that the placeholder has one spelling.
_SHAPE = re.compile(r"[A-Za-z0-9._~*-]{1,256}\Z")
_REPEATED = re.compile(r"\*\{([0-9]{1,3})\}")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}\Z")
# Hop-by-hop, framing and routing headers: a secret there would go to the wrong reader or change the
# message.
_FORBIDDEN_HEADERS = frozenset(
    {
        "connection", "content-length", "expect", "host", "keep-alive", "proxy-authenticate",
        "proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip


class SecretArguments(TypedDict, total=False):
    """What else every way to make a `Secret` takes.

    headers: names of the headers it may stand in; default those that carry keys.
    places: where else: "query", "path", "body". Where a server repeats a place, it repeats the value.
    shape: what the placeholder looks like, each * a random letter or digit, *{36} so many of them:
        "ghp_*{36}", for a tool that checks its tokens.
    """

    headers: Iterable[str]
    places: Iterable[Place]
    shape: str


class Secret:
    """A named value for some hosts. Immutable; equal only to itself."""

    __slots__ = ("_source", "_value", "headers", "hosts", "name", "places", "refresh_s", "shape")

    name: str
    hosts: tuple[str, ...]
    headers: tuple[str, ...]
    places: tuple[Place, ...]
    shape: str
    refresh_s: float | None
    _value: str
    _source: Callable[[], str] | None

    def __init__(
        self, name: str, value: str, *, hosts: Iterable[str], **more: Unpack[SecretArguments]
    ) -> None:
        operation = f"declare the secret {name!r}"
        refuse_unknown(operation, more, SecretArguments.__annotations__)
        fields = {
            "name": _check_name(operation, name),
            "hosts": _check_list(operation, "hosts", hosts),
            "headers": _check_headers(operation, more.get("headers", DEFAULT_HEADERS)),
            "places": _check_places(operation, more.get("places", ())),
            "shape": _check_shape(operation, more.get("shape", "")),
            "refresh_s": None,
            "_value": _check_value(operation, value),
            "_source": None,
        }
        for field, content in fields.items():
            object.__setattr__(self, field, content)

    @classmethod
    def from_value(
        cls, name: str, value: str, *, hosts: Iterable[str], **more: Unpack[SecretArguments]
    ) -> Secret:
        """Make a secret of a value that the program already has."""
        return cls(name, value, hosts=hosts, **more)

    @classmethod
    def from_env(
        cls, name: str, *, hosts: Iterable[str], **more: Unpack[SecretArguments]
    ) -> Secret:
        """Read the environment variable `name`. Raises UsageError when it is unset or empty."""
        value = os.environ.get(name, "")
        if not value:
            raise UsageError(
                f"read the secret {name!r} from the environment",
                f"the variable {name} is not set" if name not in os.environ else f"{name} is empty",
                "Set it in the environment of this program",
            )
        return cls(name, value, hosts=hosts, **more)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str,
        hosts: Iterable[str],
        **more: Unpack[SecretArguments],
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
        return cls(name, value.removesuffix("\n").removesuffix("\r"), hosts=hosts, **more)

    @classmethod
    def from_callback(
        cls,
        name: str,
        callback: Callable[[], str],
        *,
        hosts: Iterable[str],
        refresh_s: float | None = None,
        **more: Unpack[SecretArguments],
    ) -> Secret:
        """Take the value from `callback`: now, and again in a thread when it is used after `refresh_s` seconds.

        `command_output([...])` is the callback of a program that prints it. What the callback raises
        now goes to the caller; later it refuses the request that needs the value.
        """
        if refresh_s is not None and not refresh_s > 0:
            raise UsageError(f"declare the secret {name!r}", "refresh_s is not more than 0 seconds")
        secret = cls(name, callback(), hosts=hosts, **more)
        object.__setattr__(secret, "_source", callback)
        object.__setattr__(secret, "refresh_s", refresh_s)
        return secret

    def renewed(self) -> Secret:
        """Return the secret with what its source says now, which may take a while.

        Without a source it is the same.
        """
        if self._source is None:
            return self
        more: SecretArguments = {
            "headers": self.headers,
            "places": self.places,
            "shape": self.shape,
        }
        return Secret.from_callback(
            self.name, self._source, hosts=self.hosts, refresh_s=self.refresh_s, **more
        )

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


def _check_places(operation: str, places: Iterable[Place]) -> tuple[Place, ...]:
    named = ("",) if isinstance(places, str) else tuple(places)
    if not set(named) <= set(PLACES):
        known = ", ".join(PLACES)
        raise UsageError(
            operation, f"its places are not among {known}", "Headers need not be named as one"
        )
    return tuple(place for place in PLACES if place in named)


def _check_shape(operation: str, text: str) -> str:
    shape = _REPEATED.sub(lambda match: "*" * int(match[1]), text)
    if shape and (not _SHAPE.match(shape) or shape.count("*") < MIN_RANDOM):
        raise UsageError(
            operation,
            f"the shape is not letters, digits, . _ ~ - with at least {MIN_RANDOM} * in it, 256 signs at most",
            'Write it like "ghp_*{36}"',
        )
    return shape


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
