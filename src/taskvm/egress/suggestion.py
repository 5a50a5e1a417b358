"""A small policy from an audit log: what a sandbox used, and nothing that it did not.

Each host gets one rule with the methods it was asked with, and its paths: exactly where they are
few, else what they have in common. One whose TLS was passed through is allowed as a whole. What the guest
wrote into the log makes no rule that cannot be read back. A person reads it before it is used: what was used was not
always needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from taskvm.egress.audit import AuditEvent
from taskvm.egress.hostpattern import AddressRule, HostPattern
from taskvm.egress.pathpattern import AmbiguousPathError, PathPattern, plain_segments
from taskvm.egress.policy import MAX_NAME, Policy, Rule, Scheme, is_method
from taskvm.errors import UsageError

MAX_PATHS = 8  # of one rule; more are widened


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The policy that allows what was used, and how often each other host was refused.

    `unsaid` are hosts that were asked by methods that no rule can name, `passed` those to name in `passthrough` too.
    """

    policy: Policy
    denied: dict[str, int]
    unsaid: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()

    def to_toml(self) -> str:
        """Return it as a policy file, what it cannot say as comments."""
        notes = [
            *(f"# passed through unread: name it in passthrough too: {host}\n" for host in self.passed),
            *(f"# not allowed here, asked by a method that is not in capitals: {host}\n" for host in self.unsaid),
            *(f"# refused {count} times: {host}\n" for host, count in self.denied.items()),
        ]  # fmt: skip
        return self.policy.to_toml() + ("\n" + "".join(notes) if notes else "")


@dataclass(slots=True)
class _Used:
    methods: set[str] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)


def suggest_policy(events: Iterable[AuditEvent]) -> Suggestion:
    """Return the smallest policy of this form that allows every request that was allowed and a rule can name."""
    used: dict[tuple[str, int, Scheme], _Used] = {}
    addresses: dict[str, None] = {}
    denied: dict[str, int] = {}
    passed: dict[str, None] = {}
    unsaid: dict[str, None] = {}
    for event in events:
        host = event.host or event.address
        if event.kind == "request" and event.decision == "allow" and event.scheme in _SCHEMES:
            if not is_method(event.method):
                unsaid[_authority(host, event.port)] = None
                continue
            entry = used.setdefault((host, event.port, _SCHEMES[event.scheme]), _Used())
            entry.methods.add(event.method)
            entry.paths.add(event.path)
        elif event.kind == "tls" and event.decision == "allow" and event.rule == "passthrough":
            passed[_authority(host, event.port)] = None
        elif event.kind == "connect" and event.decision == "allow" and event.rule != "public":
            addresses[_authority(event.address, event.port)] = None
        elif event.rule == "dns-type":
            continue  # no rule lets it be answered
        elif event.decision == "deny" and event.kind in ("dns", "connect", "request") and host:
            shown = _authority(host, event.port)
            denied[shown] = denied.get(shown, 0) + 1
    seen = {
        origin: entry for origin, entry in used.items() if _authority(*origin[:2]) not in passed
    }
    rules = tuple(_rule(*origin, entry) for origin, entry in sorted(seen.items()))
    policy = Policy(rules, tuple(AddressRule.parse(address) for address in addresses))
    return Suggestion(policy.allowing(*sorted(passed)), denied, tuple(unsaid), tuple(passed))


_SCHEMES: dict[str, Scheme] = {"http": "http", "https": "https"}


def _rule(host: str, port: int, scheme: Scheme, used: _Used) -> Rule:
    authority = _authority(host, port)
    methods = used.methods - ({"HEAD"} if "GET" in used.methods else set())
    return Rule(
        name=f"use {authority}"[:MAX_NAME],
        allow=True,
        hosts=(HostPattern.parse(authority),),
        scheme=scheme,
        methods=tuple(sorted(methods)),
        paths=_paths(used.paths),
    )


def _paths(paths: Iterable[str]) -> tuple[PathPattern, ...]:
    """Return patterns for all paths; none (which is every path) where one is ambiguous."""
    try:
        split = {plain_segments(path.encode()) for path in paths}
    except AmbiguousPathError:
        return ()
    depth = max(map(len, split), default=0)
    while (found := {_cut(segments, depth) for segments in split}) and len(found) > MAX_PATHS:
        depth -= 1
    return tuple(PathPattern.parse(pattern) for pattern in sorted(found))


def _cut(segments: tuple[str, ...], depth: int) -> str:
    """Return the path as a pattern, `**` from where it is too deep, or has what patterns lack."""
    for end in range(min(len(segments), depth), 0, -1):
        text = "/" + "/".join(segments[:end]) + ("" if end == len(segments) else "/**")
        try:
            PathPattern.parse(text)
        except UsageError:
            continue
        if not any("*" in segment for segment in segments[:end]):
            return text
    return "/**"


def _authority(host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host and port else host
    return f"{shown}:{port}" if port else shown
