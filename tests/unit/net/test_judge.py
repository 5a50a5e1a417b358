"""Judging requests: the order of the decisions, and what the record says of each."""

from __future__ import annotations

import os

import h11
import pytest

from taskvm.egress.audit import AuditEvent, parse_event
from taskvm.egress.boundsecret import bind_secrets
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.net.auditlog import AuditLog
from taskvm.net.certs import CertificateAuthority
from taskvm.net.egress import Egress, Refusal, Session
from taskvm.net.judge import Admitted, Judge
from taskvm.net.keyring import Keyring
from taskvm.net.names import SyntheticNames
from taskvm.net.resolver import HostResolver
from taskvm.net.upstream import Dialer
from taskvm.wire.http1 import read_request
from taskvm.wire.message import Origin, RequestHead, ResponseHead

VALUE = "sk-live-0123456789abcdef"
POLICY = Policy.parse(["api.test"])
(BOUND,) = bind_secrets(POLICY, [Secret("KEY", VALUE, hosts=["api.test"])], os.urandom)


class Court:
    """A judge of one connection to `host`, and its record."""

    def __init__(self, host: str = "api.test", max_bytes: int = 100_000) -> None:
        self.lines: list[bytes] = []
        egress = Egress(
            POLICY, Keyring([BOUND]), AuditLog(self.lines.append, "box", max_bytes=max_bytes),
            CertificateAuthority.create(), Dialer(POLICY, HostResolver()), SyntheticNames(),
        )  # fmt: skip
        self.origin = Origin("https", host, 443)
        self.judge = Judge(Session(egress, self.origin, 7))

    async def admit(
        self, *headers: tuple[str, str], host: str = "api.test", target: str = "/"
    ) -> Admitted:
        request = h11.Request(method="GET", target=target, headers=[("Host", host), *headers])
        return await self.judge.admit(read_request(request, self.origin))

    @property
    def events(self) -> list[AuditEvent]:
        return [parse_event(line) for line in self.lines]


async def test_an_allowed_request_is_recorded_before_it_is_returned() -> None:
    court = Court()

    await court.admit(("Authorization", BOUND.placeholder), target="/a?b=c")

    assert [(e.kind, e.decision, e.secrets, e.connection) for e in court.events] == [
        ("request", "allow", ("KEY",), 7), ("secret", "allow", ("KEY",), 7),
    ]  # fmt: skip
    assert (court.events[0].method, court.events[0].path) == ("GET", "/a")
    assert VALUE.encode() not in b"".join(court.lines)


@pytest.mark.parametrize(
    ("host", "headers", "status", "kind"),
    [
        ("evil.test", [], 403, "egress_denied"),
        ("api.test", [("Expect", "200-ok")], 417, "bad_request"),
        ("api.test", [("X", BOUND.placeholder)], 403, "egress_denied"),
        ("api.test", [("X", VALUE)], 403, "egress_denied"),
    ],
)
async def test_a_refused_request_is_recorded_with_its_rule(
    host: str, headers: list[tuple[str, str]], status: int, kind: str
) -> None:
    court = Court()

    with pytest.raises(Refusal) as caught:
        await court.admit(*headers, host=host)

    assert (caught.value.status, caught.value.kind) == (status, kind)
    assert (court.events[-1].decision, court.events[-1].rule) == ("deny", caught.value.rule)
    assert VALUE not in str(caught.value) + caught.value.hint


async def test_the_policy_is_asked_for_every_request() -> None:
    court = Court(host="other.test")

    with pytest.raises(Refusal) as caught:
        await court.admit(host="other.test")

    assert caught.value.rule == "default"


async def test_a_path_with_a_value_in_it_is_not_recorded() -> None:
    court = Court()

    for target in (f"/{VALUE}", f"/{VALUE.replace('-', '%2d')}", f"/{BOUND.placeholder}"):
        with pytest.raises(Refusal):
            await court.admit(target=target)

    assert {event.path for event in court.events} == {"", "/{KEY}"}
    assert VALUE.encode() not in b"".join(court.lines)
    assert BOUND.placeholder.encode() not in b"".join(court.lines)


async def test_what_cannot_be_recorded_is_refused() -> None:
    with pytest.raises(Refusal) as caught:
        await Court(max_bytes=10).admit()

    assert caught.value.rule == "audit"


async def test_a_trailer_is_searched() -> None:
    court = Court()

    assert court.judge.admit_trailer([(b"X-Sum", b"1")]) == [(b"X-Sum", b"1")]
    with pytest.raises(Refusal):
        court.judge.admit_trailer([(b"X", BOUND.placeholder.encode())])


async def test_a_trailer_overrides_nothing_that_was_judged() -> None:
    """Servers that take a trailer's fields for the head's would see another method, or path."""
    fields = [(b"X-Sum", b"1"), (b"x_http_method_override", b"DELETE"), (b"X-Original-URL", b"/b")]

    assert Court().judge.admit_trailer(fields) == [(b"X-Sum", b"1")]


async def test_an_answer_passes_as_it_came() -> None:
    response = ResponseHead(200, [(b"X", b"1"), (b"Content-Length", b"1")])

    head = RequestHead(b"GET", b"/", [])
    admitted = Admitted(head, head)

    answered = await Court(host="other.test").judge.admit_response(admitted, response)

    assert answered.head is response
    assert answered.body is None
