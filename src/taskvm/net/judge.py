"""Whether a request may leave, and how: framing, authority, policy, secrets, in this order.

Rule 1: every request is recorded, allowed or not, before anything is sent; what cannot be recorded
        is refused.
Rule 2: secrets come last, after every decision, so nothing that decides or records has seen a
        value.
"""

from __future__ import annotations

import h11

from taskvm.injection import InjectionRefused
from taskvm.net.egress import UNRECORDED, Refusal, Session
from taskvm.policy import Intent, decide_request
from taskvm.wire.http1 import (
    Header,
    HttpRefused,
    RequestHead,
    check_request,
    may_have_trailer,
    trailer_headers,
)

# What frameworks take for the method instead of the one in the request line.
_METHOD_OVERRIDES = frozenset({b"x-http-method-override", b"x-http-method", b"x-method-override"})


class Judge:
    """Decides about the requests of one connection. With `denied`, all get that for an answer."""

    def __init__(self, session: Session, denied: Refusal | None = None) -> None:
        self._session = session
        self._injector = session.egress.injector
        self._denied = denied

    def admit(self, request: h11.Request) -> RequestHead:
        """Return the head to send, secrets in it. Raises Refusal; either way it is recorded."""
        seen = self._describe(request)
        record = self._session.record
        try:
            rule, head, secrets = self._decide(request)
        except Refusal as refusal:
            record("request", "deny", rule=refusal.rule, reason=refusal.reason, **seen)
            raise
        recorded = record("request", "allow", rule=rule, secrets=secrets, **seen)
        if secrets:
            recorded &= record("secret", "allow", rule=rule, secrets=secrets)
        if not recorded:
            raise Refusal.of(UNRECORDED)
        return head

    def admit_trailer(self, head: RequestHead, end: h11.EndOfMessage) -> list[Header]:
        """Return the trailer to send after a body.

        Raises Refusal when a secret's trace is in it.
        """
        if not may_have_trailer(head.headers):
            return []
        fields = trailer_headers(end.headers.raw_items())
        try:
            for name, value in fields:
                self._injector.refuse_traces(name + b":" + value, "the trailer")
        except InjectionRefused as error:
            raise self._refuse_secret(error) from error
        return fields

    def refuse_unread(self, status: int) -> Refusal:
        """Record bytes that are no request; return the refusal that answers them."""
        reason = "the request is not valid HTTP/1.1"
        self._session.record("request", "deny", rule="http", reason=reason)
        return Refusal(status, "bad_request", "http", reason)

    def _decide(self, request: h11.Request) -> tuple[str, RequestHead, tuple[str, ...]]:
        if self._denied is not None:
            raise self._denied
        origin = self._session.origin
        try:
            head = check_request(request, origin)
        except HttpRefused as error:
            kind = "egress_denied" if error.status == 403 else "bad_request"
            raise Refusal(error.status, kind, "http", error.reason) from error
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
        sent = RequestHead(head.method, head.target, injected.headers)
        return decision.rule, sent, injected.used

    def _refuse_secret(self, error: InjectionRefused) -> Refusal:
        self._session.record("secret", "deny", reason=error.reason, secrets=(error.secret,))
        return Refusal(403, "egress_denied", "secret", error.reason, error.hint)

    def _describe(self, request: h11.Request) -> dict[str, str]:
        """Return what the record says of a request: nothing, where a secret's trace is in it."""
        try:
            for text in (request.method, request.target):
                self._injector.refuse_traces(text, "the request line")
        except InjectionRefused:
            return {}
        return {
            "scheme": self._session.origin.scheme,
            "method": request.method.decode("ascii"),
            "path": request.target.partition(b"?")[0].decode("ascii"),
        }
