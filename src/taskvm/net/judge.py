"""Whether a request may leave, and how: framing, authority, policy, secrets, in this order.

Rule 1: every request is recorded, allowed or not, before anything is sent; what cannot be recorded
        is refused.
Rule 2: secrets come last, after every decision, so nothing that decides or records has seen a
        value.
"""

from __future__ import annotations

from dataclasses import replace

from taskvm.injection import InjectionRefused
from taskvm.net.egress import UNRECORDED, Refusal, Session
from taskvm.policy import Intent, decide_request
from taskvm.wire.message import Asked, Header, HttpRefused, RequestHead, ResponseHead

# What frameworks take for the method instead of the one in the request line.
_METHOD_OVERRIDES = frozenset({b"x-http-method-override", b"x-http-method", b"x-method-override"})


class Judge:
    """Decides about the requests of one connection. With `denied`, all get that for an answer."""

    def __init__(self, session: Session, denied: Refusal | None = None) -> None:
        self._session = session
        self._injector = session.egress.injector
        self._denied = denied

    async def admit(self, asked: Asked) -> RequestHead:
        """Return the head to send, secrets in it. Raises Refusal; either way it is recorded."""
        seen = self._describe(asked)
        record = self._session.record
        try:
            rule, head, secrets = self._decide(asked)
        except Refusal as refusal:
            record("request", "deny", rule=refusal.rule, reason=refusal.reason, **seen)
            raise
        recorded = record("request", "allow", rule=rule, secrets=secrets, **seen)
        if secrets:
            recorded &= record("secret", "allow", rule=rule, secrets=secrets)
        if not recorded:
            raise Refusal.of(UNRECORDED)
        return head

    async def admit_response(self, request: RequestHead, response: ResponseHead) -> ResponseHead:
        """Return the head of the answer to an admitted request, as the guest gets it."""
        del request
        return response

    def admit_trailer(self, fields: list[Header]) -> list[Header]:
        """Return the trailer to send after a body.

        Raises Refusal when a secret's trace is in it.
        """
        try:
            for name, value in fields:
                self._injector.refuse_traces(name + b":" + value, "the trailer")
        except InjectionRefused as error:
            raise self._refuse_secret(error) from error
        return fields

    def refuse_unread(self, status: int) -> Refusal:
        """Record bytes that are no request; return the refusal that answers them."""
        reason = "the request is not valid HTTP"
        self._session.record("request", "deny", rule="http", reason=reason)
        return Refusal(status, "bad_request", "http", reason)

    def _decide(self, asked: Asked) -> tuple[str, RequestHead, tuple[str, ...]]:
        if self._denied is not None:
            raise self._denied
        origin, head = self._session.origin, asked.head
        if isinstance(head, HttpRefused):
            kind = "egress_denied" if head.status == 403 else "bad_request"
            raise Refusal(head.status, kind, "http", head.reason) from head
        intent = Intent(
            origin.scheme, origin.host, origin.port, head.method.decode("ascii"), head.target,
            overrides_method=any(name.lower() in _METHOD_OVERRIDES for name, _ in head.headers),
        )  # fmt: skip
        decision = decide_request(self._session.egress.policy, intent)
        if not decision.allowed:
            raise Refusal.of(decision)
        try:
            self._injector.refuse_traces(head.method, "the method")
            injected = self._injector.inject(
                origin.scheme, origin.host, origin.port, head.target, head.headers
            )
        except InjectionRefused as error:
            raise self._refuse_secret(error) from error
        return decision.rule, replace(head, headers=injected.headers), injected.used

    def _refuse_secret(self, error: InjectionRefused) -> Refusal:
        self._session.record("secret", "deny", reason=error.reason, secrets=(error.secret,))
        return Refusal(403, "egress_denied", "secret", error.reason, error.hint)

    def _describe(self, asked: Asked) -> dict[str, str]:
        """Return what the record says of a request: nothing, where a secret's trace is in it."""
        try:
            for text in (asked.method, asked.target):
                self._injector.refuse_traces(text, "the request line")
        except InjectionRefused:
            return {}
        return {
            "scheme": self._session.origin.scheme,
            "method": asked.method.decode("latin-1"),
            "path": asked.target.partition(b"?")[0].decode("latin-1"),
        }
