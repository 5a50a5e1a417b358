"""Answering the guest's DNS queries: every answer is made here, none is asked for anywhere.

An allowed name gets its synthetic address, a denied one NXDOMAIN. An address that was given has its
name. Nothing else exists.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from taskvm.egress.audit import Verdict
from taskvm.egress.policy import Decision
from taskvm.net.auditlog import AuditLog
from taskvm.net.names import SyntheticNames
from taskvm.wire.dns import (
    DnsError,
    QType,
    Query,
    RCode,
    build_answer,
    parse_query,
    pointed_address,
)

# A name is recorded when it is first asked for; of this many it is remembered that it was.
MAX_REMEMBERED = 4096

_KNOWN_TYPES = frozenset(QType)


class NameServer:
    """The DNS of one sandbox. `judge` says of a canonical name whether it exists, at that moment."""

    def __init__(
        self, judge: Callable[[str], Decision], names: SyntheticNames, audit: AuditLog
    ) -> None:
        self._judge = judge
        self._names = names
        self._audit = audit
        self._recorded: OrderedDict[tuple[str, Verdict, str], None] = OrderedDict()

    def answer(self, message: bytes) -> bytes:
        """Return the answer to one message, or b"" where there is none."""
        try:
            query = parse_query(message)
        except DnsError as error:
            self._record("", "deny", "dns", str(error))
            return error.reply
        if query.qtype not in _KNOWN_TYPES:
            # TXT, NULL, ANY and others: what carries data out of elsewhere by names.
            self._record(query.name, "deny", "dns-type", f"type {query.qtype} is not answered")
            return build_answer(query, RCode.REFUSED)
        return self._answer_pointer(query) if query.qtype == QType.PTR else self._answer_name(query)

    def _answer_name(self, query: Query) -> bytes:
        decision = self._judge(query.name)
        if not decision.allowed:
            self._record(query.name, "deny", decision.rule, decision.reason)
            return build_answer(query, RCode.NXDOMAIN)
        if query.qtype != QType.A:
            return build_answer(query, RCode.NOERROR)
        address = self._names.address_of(query.name)
        if address is None:
            self._record(query.name, "deny", "name-limit", "the sandbox has used up its names")
            return build_answer(query, RCode.SERVFAIL)
        if not self._record(query.name, "allow", decision.rule, decision.reason):
            return build_answer(query, RCode.SERVFAIL)
        return build_answer(query, RCode.NOERROR, address)

    def _answer_pointer(self, query: Query) -> bytes:
        address = pointed_address(query.name)
        name = None if address is None else self._names.name_at(address)
        if name is None:
            self._record(query.name, "deny", "unknown-address", "this sandbox was not given it")
            return build_answer(query, RCode.NXDOMAIN)
        return build_answer(query, RCode.NOERROR, name)

    def _record(self, name: str, verdict: Verdict, rule: str, reason: str) -> bool:
        key = (name or reason, verdict, rule if rule == "dns-type" else "")
        if key in self._recorded:
            self._recorded.move_to_end(key)
            return True
        self._recorded[key] = None
        if len(self._recorded) > MAX_REMEMBERED:
            self._recorded.popitem(last=False)
        return self._audit.record("dns", verdict, host=name, rule=rule, reason=reason)
