"""Secrets in requests: the guest writes a placeholder, the host puts the value there or refuses.

Rule 1: a placeholder is replaced only in a request to one of its secret's hosts, in one of its
        secret's headers, over TLS (in clear only where the secret's host names the port). Anywhere
        else in the head it refuses the request.
Rule 2: one pass over each value, never over its result: a value that looks like a placeholder stays
        a value.
Rule 3: a real value that comes from the guest refuses the request: it leaked, and must not travel
        on.
Rule 4: called after the policy decision; what is logged names the secret, never its value.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote_to_bytes

from taskvm.errors import UsageError
from taskvm.hostpattern import HostPattern
from taskvm.policy import Policy
from taskvm.secret import Secret

PLACEHOLDER_ENTROPY = 24  # bytes: not to be guessed, and never a part of another text by chance
# Shorter values occur in ordinary requests by chance.
MIN_TRACED_VALUE = 8

Header = tuple[bytes, bytes]

_BASIC = re.compile(rb"(basic[ \t]+)([A-Za-z0-9+/_=-]+)\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BoundSecret:
    """A secret of one sandbox: what the guest sees instead of it, and its hosts as patterns."""

    secret: Secret
    placeholder: str
    hosts: tuple[HostPattern, ...]

    def may_go_to(self, scheme: Literal["http", "https"], host: str, port: int) -> bool:
        """Say whether the value may be sent to this origin."""
        return any(
            pattern.matches(host, port) and (scheme == "https" or pattern.port is not None)
            for pattern in self.hosts
        )


@dataclass(frozen=True, slots=True)
class Injected:
    """The headers to send, and the names of the secrets in them."""

    headers: list[Header] = field(repr=False)  # values are in them
    used: tuple[str, ...]


class InjectionRefused(Exception):  # noqa: N818 - an outcome of a rule, named like the rule's word
    """Raised when a request must not be forwarded.

    `secret` is the name; the message never holds a value.
    """

    def __init__(self, secret: str, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.secret = secret
        self.reason = reason
        self.hint = hint


def bind_secrets(
    policy: Policy, secrets: Iterable[Secret], random_bytes: Callable[[int], bytes]
) -> tuple[BoundSecret, ...]:
    """Give each secret its placeholder for one sandbox.

    `random_bytes` is a cryptographic source, such as `os.urandom`. Raises UsageError when a host of
    a secret is not within the allowed hosts.
    """
    bound: list[BoundSecret] = []
    for secret in secrets:
        operation = f"use the secret {secret.name!r}"
        if any(other.secret.name == secret.name for other in bound):
            raise UsageError(operation, "two secrets have this name")
        patterns = tuple(HostPattern.parse(host) for host in secret.hosts)
        for pattern in patterns:
            if not policy.covers(pattern):
                raise UsageError(
                    operation,
                    f"its host {pattern} is not within the allowed hosts",
                    f'Add "{pattern}" to the allowed hosts, or take it from the secret',
                )
        token = random_bytes(PLACEHOLDER_ENTROPY).hex()
        bound.append(BoundSecret(secret, f"taskvm_secret_{secret.name}_{token}", patterns))
    return tuple(bound)


class Injector:
    """Puts the secrets of one sandbox into the heads of its requests."""

    def __init__(self, secrets: Sequence[BoundSecret]) -> None:
        self._by_placeholder = {bound.placeholder.encode(): bound for bound in secrets}
        self._placeholders = _any_of(self._by_placeholder)
        self._by_value = {
            bound.secret.reveal().encode(): bound
            for bound in secrets
            if len(bound.secret.reveal()) >= MIN_TRACED_VALUE
        }
        self._values = _any_of(self._by_value)

    def inject(
        self,
        scheme: Literal["http", "https"],
        host: str,
        port: int,
        target: bytes,
        headers: Sequence[Header],
    ) -> Injected:
        """Return the headers with values in place of placeholders. Raises InjectionRefused."""
        self.refuse_traces(target, "the path or query")
        used: set[str] = set()

        def place(header: str, match: re.Match[bytes]) -> bytes:
            bound = self._by_placeholder[match.group()]
            _check_use(bound, scheme, host, port, header)
            used.add(bound.secret.name)
            return bound.secret.reveal().encode()

        sent: list[Header] = []
        for name, value in headers:
            self.refuse_traces(name, "a header's name")
            self._refuse_values(value, "a header")
            sent.append((name, self._replace(name.decode("latin-1").lower(), value, place)))
        return Injected(sent, tuple(sorted(used)))

    def refuse_traces(self, text: bytes, place: str) -> None:
        """Raise InjectionRefused when `text`, sent as it is, holds a placeholder or a value."""
        for variant in {text, unquote_to_bytes(text)}:
            if match := self._placeholders.search(variant):
                raise InjectionRefused(
                    self._by_placeholder[match.group()].secret.name,
                    f"a secret's placeholder stands in {place}",
                    "Send it in one of the secret's headers, such as Authorization",
                )
            self._refuse_values(variant, place)

    def _refuse_values(self, text: bytes, place: str) -> None:
        basic = _decode_basic(text)
        for variant in (text, basic[1]) if basic else (text,):
            if match := self._values.search(variant):
                raise InjectionRefused(
                    self._by_value[match.group()].secret.name,
                    f"the value of a secret stands in {place}",
                    "The guest must not know it: send the placeholder, and replace the secret",
                )

    def _replace(
        self, name: str, value: bytes, place: Callable[[str, re.Match[bytes]], bytes]
    ) -> bytes:
        basic = _decode_basic(value)
        if basic is not None and self._placeholders.search(basic[1]):
            credentials = self._placeholders.sub(lambda match: place(name, match), basic[1])
            return basic[0] + base64.b64encode(credentials)
        return self._placeholders.sub(lambda match: place(name, match), value)


def _check_use(bound: BoundSecret, scheme: str, host: str, port: int, header: str) -> None:
    secret = bound.secret
    if header not in {allowed.lower() for allowed in secret.headers}:
        raise InjectionRefused(
            secret.name,
            f"the secret is not sent in the header {header}",
            "Send it in one of the secret's headers, such as Authorization",
        )
    if bound.may_go_to("https", host, port) and scheme == "http":
        if not bound.may_go_to("http", host, port):
            raise InjectionRefused(
                secret.name,
                "the secret is not sent in clear",
                f'Use https, or give the secret the host "{host}:{port}"',
            )
    elif not bound.may_go_to("https", host, port):
        raise InjectionRefused(
            secret.name, "the secret is not for this host", "Ask the owner of this sandbox"
        )


def _decode_basic(value: bytes) -> tuple[bytes, bytes] | None:
    """Return the scheme and the decoded credentials of `Basic …`, as lenient as a server is."""
    match = _BASIC.match(value)
    if match is None:
        return None
    text = match.group(2).translate(bytes.maketrans(b"-_", b"+/"), b"=")
    try:
        return match.group(1), binascii.a2b_base64(text + b"=" * (-len(text) % 4))
    except binascii.Error:
        return None


def _any_of(texts: Iterable[bytes]) -> re.Pattern[bytes]:
    # Longest first: where one is a prefix of another the longer is meant. No texts: a pattern that
    # never matches.
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile(b"|".join(map(re.escape, ordered)) or rb"(?!)")
