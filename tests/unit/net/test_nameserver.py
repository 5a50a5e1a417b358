"""The guest's DNS: answers made here, a bounded table, one line for a name."""

from __future__ import annotations

from tests.support.egress_lab import dns_query

from taskvm.egress.audit import parse_event
from taskvm.egress.policy import Policy, decide_name
from taskvm.net.auditlog import AuditLog
from taskvm.net.names import SyntheticNames
from taskvm.net.nameserver import NameServer
from taskvm.wire.dns import RCode


def server(max_names: int = 100) -> tuple[NameServer, SyntheticNames, list[bytes]]:
    lines: list[bytes] = []
    names = SyntheticNames(max_names=max_names)
    policy = Policy.parse(["*.api.test", "port.test:8443"])
    log = AuditLog(lines.append, "box")
    return NameServer(lambda name: decide_name(policy, name, None), names, log), names, lines


def rcode(answer: bytes) -> int:
    return answer[3] & 15


def test_a_denied_name_takes_no_address() -> None:
    dns, names, _ = server()

    assert rcode(dns.answer(dns_query("evil.test"))) == RCode.NXDOMAIN
    assert names.export() == ()


def test_a_name_that_is_allowed_on_some_port_exists() -> None:
    dns, _, _ = server()

    assert rcode(dns.answer(dns_query("port.test"))) == RCode.NOERROR


def test_a_full_table_fails_new_names_only() -> None:
    dns, _, _ = server(max_names=2)
    known = [dns.answer(dns_query(f"{name}.api.test")) for name in "ab"]

    assert rcode(dns.answer(dns_query("c.api.test"))) == RCode.SERVFAIL
    assert dns.answer(dns_query("a.api.test")) == known[0]


def test_a_name_that_is_asked_for_again_makes_no_second_line() -> None:
    dns, _, lines = server()
    for _ in range(3):
        dns.answer(dns_query("evil.test"))
        dns.answer(dns_query("a.api.test"))
        dns.answer(b"x" * 20)

    assert [(parse_event(line).host, parse_event(line).decision) for line in lines] == [
        ("evil.test", "deny"), ("a.api.test", "allow"), ("", "deny"),
    ]  # fmt: skip


def test_a_query_of_another_type_is_refused_and_makes_one_line() -> None:
    """TXT, NULL and ANY are what carries data by names elsewhere."""
    dns, names, lines = server()
    answers = [
        dns.answer(dns_query(name, qtype))
        for name in ("evil.test", "a.api.test")
        for qtype in (1, 16, 10, 255, 16)
    ]

    assert {rcode(answer) for answer in [*answers[1:5], *answers[6:]]} == {RCode.REFUSED}
    assert [(e.host, e.decision, e.rule) for e in map(parse_event, lines)] == [
        ("evil.test", "deny", "default"), ("evil.test", "deny", "dns-type"),
        ("a.api.test", "allow", "*.api.test"), ("a.api.test", "deny", "dns-type"),
    ]  # fmt: skip
    assert names.export() == ("a.api.test",)


def test_what_cannot_be_recorded_is_not_answered() -> None:
    names = SyntheticNames()
    log = AuditLog(lambda line: None, "box", max_bytes=0)
    policy = Policy.parse(["*.api.test"])
    dns = NameServer(lambda name: decide_name(policy, name, None), names, log)

    assert rcode(dns.answer(dns_query("a.api.test"))) == RCode.SERVFAIL


def test_an_address_that_was_given_has_its_name_and_no_other_has_one() -> None:
    dns, names, lines = server()
    address = names.address_of("a.api.test")
    assert address is not None

    answer = dns.answer(dns_query(address.reverse_pointer, 12))
    others = [
        "1.0.0.127.in-addr.arpa",
        "99.0.18.198.in-addr.arpa",
        "b.api.test",
        "1.2.in-addr.arpa",
    ]
    refused = [dns.answer(dns_query(name, 12)) for name in others]

    assert answer.endswith(b"\x01a\x03api\x04test\x00")
    assert {rcode(each) for each in refused} == {RCode.NXDOMAIN}
    assert len(lines) == len(others)
