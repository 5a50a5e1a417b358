"""What all connections of one sandbox share, and the one shape that every refusal takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from taskvm.egress.audit import Kind, Verdict
from taskvm.egress.oversight import Oversight
from taskvm.egress.passthrough import NOTHING, Passthrough
from taskvm.egress.policy import Decision, Policy, decide_name
from taskvm.net.approvals import Approvals
from taskvm.net.auditlog import AuditLog
from taskvm.net.consulting import Consulting
from taskvm.net.inflight import InFlight
from taskvm.net.keyring import Keyring
from taskvm.net.names import SyntheticNames
from taskvm.net.upstream import Dialer
from taskvm.wire.address import special_range
from taskvm.wire.hostname import parse_address
from taskvm.wire.message import Header, Origin, render_refusal

if TYPE_CHECKING:
    from taskvm.net.certs import CertificateAuthority


@dataclass(slots=True)
class Egress:
    """The parts that decide about, and carry, what leaves one sandbox.

    The policy and the secrets change while it runs: who decides asks here, at that moment.
    """

    policy: Policy
    keyring: Keyring
    audit: AuditLog
    ca: CertificateAuthority
    dialer: Dialer
    names: SyntheticNames
    passthrough: Passthrough = NOTHING
    oversight: Oversight = field(default_factory=Oversight)
    widen: Callable[[str], None] = lambda host: None
    consulting: Consulting = field(init=False, default_factory=Consulting)
    in_flight: InFlight = field(init=False, default_factory=InFlight)
    approvals: Approvals | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.audit.conceal = self._conceal
        seen = self.oversight
        if seen.approver is not None:
            self.approvals = Approvals(seen.approver, seen.deadline_s, self.widen)

    def judge_name(self, host: str, port: int | None = None) -> Decision:
        """Judge a canonical name or literal before anything is looked up; without a port, for DNS."""
        if self._conceal(host) != host:
            return NAMES_A_VALUE
        decision = decide_name(self.policy, host, port)
        return ASKED_LATER if not decision.allowed and self.may_ask(host) else decision

    def _conceal(self, host: str) -> str:
        """Return a host's name without values, unless a rule has written this very name."""
        shown = self.keyring.injector.without_values(host)
        if shown != host and any(
            pattern.host == host and not pattern.wildcard
            for rule in self.policy.rules
            for pattern in rule.hosts
        ):
            return host
        return shown

    def may_ask(self, host: str) -> bool:
        """Say whether a person is asked about this host. Never about an internal address."""
        literal = parse_address(host)
        is_special = literal is not None and bool(special_range(literal))
        return self.approvals is not None and not is_special and self.policy.is_silent_about(host)

    async def aclose(self) -> None:
        """Ask no person, hook and secret's source any more; none is waited for."""
        self.consulting.close()
        self.keyring.close()
        if self.approvals is not None:
            await self.approvals.aclose()

    def change_policy(self, policy: Policy) -> None:
        """Judge by `policy` from now on. Connections that are open are not touched."""
        self.policy = self.dialer.policy = policy


@dataclass(frozen=True, slots=True)
class Session:
    """One connection of the guest, once it is known where it may go."""

    egress: Egress
    origin: Origin
    connection: int
    exec: int = 0  # which the guest says it comes from

    def record(self, kind: Kind, decision: Verdict, **fields: Any) -> bool:
        """Record an event of this connection; `fields` are those of AuditEvent.

        False: it is not recorded.
        """
        origin = self.origin
        return self.egress.audit.record(
            kind, decision, connection=self.connection, exec=self.exec,
            host=origin.host, port=origin.port, **fields,
        )  # fmt: skip


class Refusal(Exception):  # noqa: N818 - an answer for the guest, not a fault
    """Raised where a request ends without its server's answer.

    `kind` is the type in the JSON body: egress_denied (policy), bad_request (the guest's HTTP),
    upstream_failed.
    """

    def __init__(self, status: int, kind: str, rule: str, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.kind = kind
        self.rule = rule
        self.reason = reason
        self.hint = hint

    def render(self, host: str) -> tuple[list[Header], bytes]:
        """Return the headers and the body that answer the guest, who asked for something of `host`."""
        body = render_refusal(self.kind, host, self.rule, self.reason, self.hint)
        headers = [
            (b"Content-Type", b"application/json"),
            (b"Content-Length", b"%d" % len(body)),
            (b"Cache-Control", b"no-store"),
        ]
        return headers, body

    @classmethod
    def of(cls, decision: Decision) -> Refusal:
        """Return the refusal that a denial of the policy means."""
        return cls(403, "egress_denied", decision.rule, decision.reason, decision.hint)


ASKED_LATER = Decision(True, "ask", "a person is asked when a request is made")
NAMES_A_VALUE = Decision(
    False, "secret", "the value of a secret stands in the host's name",
    "The guest must not know it: replace the secret",
)  # fmt: skip
CROWDED = Decision(
    False, "request-limit", "too many requests of this sandbox are under way",
    "Wait for answers before asking for more",
)  # fmt: skip
UNRECORDED = Decision(
    False, "audit", "the decision cannot be recorded",
    "The audit log of this sandbox is full or cannot be written",
)  # fmt: skip
