"""What a policy would do with a request, step by step, without doing any of it: no lookup, no packet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from taskvm.egress.policy import (
    Decision,
    Intent,
    Policy,
    Scheme,
    decide_address,
    decide_name,
    decide_request,
)
from taskvm.errors import UsageError
from taskvm.wire.hostname import HostNameError, parse_address, parse_authority, render_authority

DEFAULT_PORTS: dict[str, int] = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_SCHEMES: dict[str, Scheme] = {"http": "http", "https": "https", "ws": "http", "wss": "https"}


@dataclass(frozen=True, slots=True)
class Step:
    """One decision on the way of a request: about its `name`, the `request` itself, or an `address`."""

    subject: str
    decision: Decision


@dataclass(frozen=True, slots=True)
class Explanation:
    """The decisions about one request, in their order; the last one decides."""

    request: str
    steps: tuple[Step, ...]

    @property
    def allowed(self) -> bool:
        """Whether the request would be sent (to a public address, where that is not known yet)."""
        return self.steps[-1].decision.allowed


def explain(
    policy: Policy, url: str, *, method: str = "GET", resolve: Mapping[str, str] | None = None
) -> Explanation:
    """Return what `policy` would do with a request to `url`. Nothing is looked up.

    resolve: name → address, as for a sandbox; the address of another name is judged when it is known.
    Raises UsageError for a text that is no http(s) or ws(s) URL.
    """
    intent = _read_url(url, method)
    authority = render_authority(intent.host, intent.port, DEFAULT_PORTS[intent.scheme])
    path = intent.target.decode("ascii", "replace")
    shown = f"{method} {intent.scheme}://{authority}{path}"
    return Explanation(shown, tuple(_steps(policy, intent, resolve or {})))


def _steps(policy: Policy, intent: Intent, resolve: Mapping[str, str]) -> Iterator[Step]:
    name = decide_name(policy, intent.host, intent.port)
    yield Step("name", name)
    if not name.allowed:
        return
    request = decide_request(policy, intent)
    yield Step("request", request)
    address = parse_address(resolve.get(intent.host, intent.host))
    if request.allowed and address is not None:
        yield Step("address", decide_address(policy, intent.host, address, intent.port))


def _read_url(url: str, method: str) -> Intent:
    operation = f"read the URL {url!r}"
    help_text = "Write it like https://api.example.com/v1/models"
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UsageError(operation, str(error), help_text) from error
    if parts.scheme.lower() not in _SCHEMES:
        raise UsageError(operation, "it does not start with https:// or http://", help_text)
    scheme = _SCHEMES[parts.scheme.lower()]
    try:
        host, port = parse_authority(parts.netloc, DEFAULT_PORTS[scheme])
    except HostNameError as error:
        raise UsageError(operation, f"its host is refused: {error}", help_text) from error
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not target.isascii() or " " in target:
        raise UsageError(operation, "its path has characters that are not escaped", help_text)
    return Intent(scheme, host, port, method, target.encode("ascii"))
