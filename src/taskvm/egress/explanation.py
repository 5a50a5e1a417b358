"""What a policy would do with a request, step by step, without doing any of it: no lookup, no packet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from taskvm.egress.hostpattern import to_ascii
from taskvm.egress.nametable import parse_table
from taskvm.egress.passthrough import Passthrough
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
from taskvm.wire.hostname import (
    HostNameError,
    IPAddress,
    parse_address,
    parse_authority,
    render_authority,
)
from taskvm.wire.message import HttpRefused, Origin, check_method, check_target

DEFAULT_PORTS: dict[str, int] = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_SCHEMES: dict[str, Scheme] = {"http": "http", "https": "https", "ws": "http", "wss": "https"}


@dataclass(frozen=True, slots=True)
class Step:
    """One decision on the way of a request: about its `name`, the `request` itself (`tls`, where that is all that
    is seen), or an `address`.
    """

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
    policy: Policy,
    url: str,
    *,
    method: str = "GET",
    resolve: Mapping[str, str] | None = None,
    passthrough: Iterable[str] = (),
) -> Explanation:
    """Return what `policy` would do with a request to `url`. Nothing is looked up.

    resolve: name → addresses, as for a sandbox; those of another name are judged when they are known.
    passthrough: hosts whose TLS is not intercepted, as for a sandbox.
    Raises UsageError for a text that is no http(s) or ws(s) URL, and for a table with what is no name or address.
    """
    known = parse_table(resolve or {})
    passed = Passthrough.parse(passthrough, policy)
    intent = _read_url(url, method)
    authority = render_authority(intent.host, intent.port, DEFAULT_PORTS[intent.scheme])
    path = intent.target.decode("ascii", "replace")
    shown = f"{method} {intent.scheme}://{authority}{path}"
    return Explanation(shown, tuple(_steps(policy, intent, known, passed)))


def _steps(
    policy: Policy,
    intent: Intent,
    known: Mapping[str, Sequence[IPAddress]],
    passthrough: Passthrough,
) -> Iterator[Step]:
    name = decide_name(policy, intent.host, intent.port)
    yield Step("name", name)
    if not name.allowed:
        return
    if intent.scheme == "https" and passthrough.names(intent.host, intent.port):
        deciding = Step("tls", _decide_passage(policy, intent))
    else:
        deciding = Step("request", _decide_http(intent) or decide_request(policy, intent))
    yield deciding
    if not deciding.decision.allowed:
        return
    literal = parse_address(intent.host)
    if literal is not None and literal.version == 6:
        yield Step("address", _NO_IPV6)
        return
    addresses = known.get(intent.host, () if literal is None else (literal,))
    decisions = [decide_address(policy, intent.host, each, intent.port) for each in addresses]
    # One that is allowed is connected to, whatever the others are.
    for decision in sorted(decisions, key=lambda each: each.allowed):
        yield Step("address", decision)


_NO_IPV6 = Decision(
    False, "no-ipv6", "the guest has no IPv6", "Write the host's name: its IPv6 addresses are reached"
)  # fmt: skip


def _decide_http(intent: Intent) -> Decision | None:
    """Return what the gateway itself says to a request before any rule is asked, if it refuses."""
    method = intent.method.encode("latin-1", "replace")
    try:
        check_method(method)
        check_target(method, intent.target, Origin(intent.scheme, intent.host, intent.port))
    except HttpRefused as refused:
        return Decision(False, "http", refused.reason)
    return None


def _decide_passage(policy: Policy, intent: Intent) -> Decision:
    if policy.allows_all(intent.host, intent.port):
        return Decision(True, "passthrough", "TLS passes unread: no method and no path is judged")
    return Decision(
        False, "passthrough", "not every request to the host is allowed, and none can be seen",
        "Allow the host as a whole, or take it from passthrough",
    )  # fmt: skip


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
        host, port = parse_authority(_in_ascii(parts.netloc), DEFAULT_PORTS[scheme])
    except HostNameError as error:
        raise UsageError(operation, f"its host is refused: {error}", help_text) from error
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not target.isascii() or " " in target:
        raise UsageError(operation, "its path has characters that are not escaped", help_text)
    return Intent(scheme, host, port, method, target.encode("ascii"))


def _in_ascii(authority: str) -> str:
    """Return the authority with an internationalized name as clients write it on the wire."""
    if authority.isascii():
        return authority
    host, colon, port = authority.partition(":")
    return to_ascii(host) + colon + port
