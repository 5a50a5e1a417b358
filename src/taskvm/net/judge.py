"""Whether a request may leave, and how: framing, authority, policy, secrets, in this order.

Rule 1: every request is recorded, allowed or not, before anything is sent; what cannot be recorded
        is refused.
Rule 2: secrets come last, after every decision, so nothing that decides or records has seen a
        value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from taskvm.egress.audit import Verdict
from taskvm.egress.injection import Injected, InjectionRefused, Injector
from taskvm.egress.oversight import Question
from taskvm.egress.policy import Decision, Intent, decide_request
from taskvm.egress.redaction import Redactor, is_readable
from taskvm.egress.replacing import Replacer
from taskvm.net.approvals import ONCE
from taskvm.net.egress import CROWDED, UNRECORDED, Refusal, Session
from taskvm.net.following import Following
from taskvm.net.hooked import HookAnswer, Hooked, both
from taskvm.wire.message import (
    Asked,
    BodyFilter,
    Header,
    HttpRefused,
    RequestHead,
    ResponseHead,
    without_length,
)

# What servers take for the method, or for the path, instead of the one in the request line: frameworks;
# Symfony and IIS's rewriting.
_METHOD_OVERRIDES = frozenset({b"x-http-method-override", b"x-http-method", b"x-method-override"})
_PATH_OVERRIDES = frozenset({b"x-original-url", b"x-rewrite-url"})
# CGI, WSGI and PHP servers make the same variable of x-a, x_a and, some of them, x.a.
_NO_LETTER = re.compile(rb"[^a-z0-9]")


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request as it is sent, and as it is `shown`, with placeholders.

    `echoes` is what a server that repeats it could give away.
    """

    head: RequestHead
    shown: RequestHead
    body: BodyFilter | None = None
    echoes: Mapping[bytes, tuple[str, bytes]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Answered:
    """A response as the guest gets it; `trailer` returns the one for the guest."""

    head: ResponseHead
    body: BodyFilter | None = None
    trailer: Callable[[list[Header]], list[Header]] = list


class Judge:
    """Decides about the requests of one connection. With `denied`, all get that for an answer."""

    def __init__(self, session: Session, denied: Refusal | None = None) -> None:
        self._session = session
        self._denied = denied
        self._hooked = Hooked(
            session.egress.oversight.hooks, session.origin, session.egress.consulting
        )
        self._approved = False  # by a person, for this connection

    async def admit(self, asked: Asked) -> Admitted:
        """Return the request to send, secrets in it. Raises Refusal; either way it is recorded."""
        seen = self._describe(asked.method, asked.target)
        try:
            head = self._check(asked)
            rule = await self._decide(head)
            if self._hooked:
                head, body = await self._hooked.request(head)
                seen = self._describe(head.method, head.target)
                rule = await self._decide(head)
            else:
                body = None
            stale = await self._renew(head)
            injected = self._inject(head)
        except HookAnswer as answer:
            self._record_request("allow", answer.rule, answer.reason, seen)
            raise
        except Refusal as refusal:
            self._session.record(
                "request", "deny", rule=refusal.rule, reason=refusal.reason, **seen
            )
            raise
        self._record_request("allow", rule, "", seen, injected.used)
        for name in injected.used:
            self._record_use(name)
        return self._admitted(head, injected, body, stale)

    async def admit_response(self, admitted: Admitted, response: ResponseHead) -> Answered:
        """Return an answer to an admitted request, as the guest gets it. Raises Refusal.

        Informational ones, and the beginning of a WebSocket, are no hook's business.
        """
        answered = self._redact(admitted, response)
        if not self._hooked or response.status < 200:
            return answered
        head, body = await self._hooked.response(admitted.shown, answered.head)
        if admitted.shown.method == b"HEAD" or head.status in (204, 304):
            return Answered(_ended(head), _Nothing(), answered.trailer)
        head = replace(head, ended=response.ended and body is None)
        return replace(answered, head=head, body=both(answered.body, body))

    def admit_trailer(self, fields: list[Header]) -> list[Header]:
        """Return the trailer to send after a body, without what could override the request that was judged.

        Raises Refusal when a secret's trace is in it.
        """
        try:
            for name, value in fields:
                self._injector.refuse_traces(name + b":" + value, "the trailer")
        except InjectionRefused as error:
            raise self._refuse_secret(error) from error
        # Some servers take a trailer's fields for the head's (CVE-2013-5704).
        overriding = _METHOD_OVERRIDES | _PATH_OVERRIDES
        return [each for each in fields if not _has_any([each], overriding)]

    def refuse_unread(self, status: int) -> Refusal:
        """Record bytes that are no request; return the refusal that answers them."""
        reason = "the request is not valid HTTP"
        self._session.record("request", "deny", rule="http", reason=reason)
        return Refusal(status, "bad_request", "http", reason)

    def refuse_crowded(self) -> Refusal:
        """Record a request that there is no room for; return the refusal that answers it."""
        self._session.record("request", "deny", rule=CROWDED.rule, reason=CROWDED.reason)
        return Refusal(429, "egress_denied", CROWDED.rule, CROWDED.reason, CROWDED.hint)

    # Deciding.

    @property
    def _injector(self) -> Injector:
        return self._session.egress.keyring.injector

    def _check(self, asked: Asked) -> RequestHead:
        if self._denied is not None:
            raise self._denied
        if isinstance(asked.head, HttpRefused):
            kind = "egress_denied" if asked.head.status == 403 else "bad_request"
            raise Refusal(asked.head.status, kind, "http", asked.head.reason) from asked.head
        return asked.head

    async def _decide(self, head: RequestHead) -> str:
        egress, origin = self._session.egress, self._session.origin
        intent = Intent(
            origin.scheme, origin.host, origin.port, head.method.decode("ascii"), head.target,
            overrides_method=_has_any(head.headers, _METHOD_OVERRIDES),
            overrides_path=_has_any(head.headers, _PATH_OVERRIDES),
        )  # fmt: skip
        decision = decide_request(egress.policy, intent)
        if not decision.allowed and egress.may_ask(origin.host):
            decision = ONCE if self._approved else await self._ask(head)
        if not decision.allowed:
            raise Refusal.of(decision)
        return decision.rule

    async def _ask(self, head: RequestHead) -> Decision:
        egress, origin = self._session.egress, self._session.origin
        assert egress.approvals is not None, "may_ask was true"
        seen = self._describe(head.method, head.target)
        question = Question(
            egress.audit.sandbox, origin.host, origin.port, origin.scheme,
            seen.get("method", ""), seen.get("path", ""),
        )  # fmt: skip
        decision = await egress.approvals.decide(question)
        verdict: Verdict = "allow" if decision.allowed else "deny"
        self._session.record("ask", verdict, rule=decision.rule, reason=decision.reason)
        self._approved = decision is ONCE
        return decision

    # Secrets.

    async def _renew(self, head: RequestHead) -> dict[str, InjectionRefused]:
        """Renew what the request uses. What its body may use and is too old is returned: it must not be put in."""
        keyring, origin = self._session.egress.keyring, self._session.origin
        stale: dict[str, InjectionRefused] = {}
        try:
            await keyring.renew(keyring.injector.mentioned(head.target, head.headers))
        except InjectionRefused as error:
            raise self._refuse_secret(error) from error
        # Nobody knows yet which of them the body has: one whose source fails refuses only where it stands.
        for name in keyring.injector.for_bodies(origin.scheme, origin.host, origin.port):
            if head.has_body:
                try:
                    await keyring.renew([name])
                except InjectionRefused as error:
                    stale[name] = error
        return stale

    def _inject(self, head: RequestHead) -> Injected:
        origin = self._session.origin
        try:
            self._injector.refuse_traces(head.method, "the method")
            return self._injector.inject(
                origin.scheme, origin.host, origin.port, head.target, head.headers
            )
        except InjectionRefused as error:
            raise self._refuse_secret(error) from error

    def _redact(self, admitted: Admitted, response: ResponseHead) -> Answered:
        keyring = self._session.egress.keyring
        tell = _once(self._record_reflection)

        def redactor(injector: Injector) -> Redactor | None:
            origin = self._session.origin
            known = [
                each for each in injector.secrets if each.is_known_to(origin.host, origin.port)
            ]
            return Redactor(known, admitted.echoes, tell) if known else None

        def trailer(fields: list[Header]) -> list[Header]:
            now = redactor(keyring.injector) if fields else None
            return now.headers(fields) if now else fields

        now = redactor(keyring.injector)
        head = _redacted(now, response) if now else response
        has_length = any(name.lower() == b"content-length" for name, _ in response.headers)
        # Without a length it may go on until there is a secret for this host.
        if response.ended or response.status < 200 or (now is None and has_length):
            return Answered(head, None, trailer)
        if not is_readable(head.headers):
            return Answered(head, None, trailer)

        def body(injector: Injector) -> Replacer | None:
            wanted = redactor(injector)
            return wanted.body() if wanted else None

        # The placeholder has another length than the value.
        head = replace(head, headers=without_length(head.headers))
        return Answered(head, Following(keyring, body), trailer)

    def _admitted(
        self,
        head: RequestHead,
        injected: Injected,
        wanted: BodyFilter | None,
        stale: Mapping[str, InjectionRefused],
    ) -> Admitted:
        origin, body, headers = self._session.origin, wanted, injected.headers
        if head.websocket:
            body = None
        elif head.has_body:
            kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
            tell = _once(self._record_use)

            def use(name: str) -> None:
                if name in stale:
                    raise stale[name]
                tell(name)

            def injecting(injector: Injector) -> tuple[Replacer | None, bool]:
                return injector.body(origin.scheme, origin.host, origin.port, kind, use)

            _, changes = injecting(self._injector)
            following = Following(
                self._session.egress.keyring, lambda injector: injecting(injector)[0]
            )
            body = both(wanted, _Refusing(following, self._refuse_secret))
            headers = without_length(headers) if changes else headers
        sent = replace(head, target=injected.target, headers=headers)
        return Admitted(sent, head, body, injected.echoes)

    def _record_request(
        self,
        verdict: Verdict,
        rule: str,
        reason: str,
        seen: dict[str, str],
        used: tuple[str, ...] = (),
    ) -> None:
        if not self._session.record(
            "request", verdict, rule=rule, reason=reason, secrets=used, **seen
        ):
            raise Refusal.of(UNRECORDED)

    def _record_use(self, name: str) -> None:
        if not self._session.record("secret", "allow", secrets=(name,)):
            raise Refusal.of(UNRECORDED)

    def _record_reflection(self, name: str) -> None:
        self._session.record(
            "secret", "deny", rule="reflection", secrets=(name,),
            reason="the response had the value: the guest got the placeholder",
        )  # fmt: skip

    def _refuse_secret(self, error: InjectionRefused) -> Refusal:
        self._session.record("secret", "deny", reason=error.reason, secrets=(error.secret,))
        return Refusal(403, "egress_denied", "secret", error.reason, error.hint)

    def _describe(self, method: bytes, target: bytes) -> dict[str, str]:
        """Return what the record says of a request: names for placeholders, nothing with a value."""
        path, _, query = target.partition(b"?")
        texts = [self._injector.without_placeholders(text) for text in (method, path, query)]
        try:
            for text in texts:
                self._injector.refuse_traces(text, "the request line")
        except InjectionRefused:
            return {}
        return {
            "scheme": self._session.origin.scheme,
            "method": texts[0].decode("latin-1"),
            "path": texts[1].decode("latin-1"),
        }


class _Nothing:
    """The body of an answer that has none, whatever the server sends and a hook's filter would add."""

    def feed(self, data: bytes) -> bytes:
        del data
        return b""

    def finish(self) -> bytes:
        return b""


def _ended(head: ResponseHead) -> ResponseHead:
    # Of 204 alone a length says nothing (RFC 9110 section 8.6).
    headers = without_length(head.headers) if head.status == 204 else head.headers
    return replace(head, headers=headers, ended=True)


class _Refusing:
    """A body's filter whose refusals answer the request."""

    def __init__(self, inner: BodyFilter, refuse: Callable[[InjectionRefused], Refusal]) -> None:
        self._inner = inner
        self._refuse = refuse

    def feed(self, data: bytes) -> bytes:
        try:
            return self._inner.feed(data)
        except InjectionRefused as error:
            raise self._refuse(error) from None

    def finish(self) -> bytes:
        try:
            return self._inner.finish()
        except InjectionRefused as error:
            raise self._refuse(error) from None


def _has_any(headers: Iterable[Header], wanted: frozenset[bytes]) -> bool:
    return any(_NO_LETTER.sub(b"-", name.lower()) in wanted for name, _ in headers)


def _redacted(redactor: Redactor, response: ResponseHead) -> ResponseHead:
    headers = redactor.headers(response.headers)
    return replace(response, headers=headers, reason=redactor.text(response.reason))


def _once(record: Callable[[str], None]) -> Callable[[str], None]:
    """Return a callback that tells each name once."""
    told: set[str] = set()

    def tell(name: str) -> None:
        if name not in told:
            told.add(name)
            record(name)

    return tell
