"""What may leave a sandbox: ordered rules, and the decisions made from them.

Rule 1: nothing is allowed that no rule names; an empty policy denies all. The first rule that names
        a request decides about it.
Rule 2: a name is judged before it is looked up (`decide_name`), each request before it is sent
        (`decide_request`), and each address that the name turns out to have before it is connected
        to (`decide_address`). All must allow.
Rule 3: internal, loopback, metadata and other special addresses are refused whatever the name says,
        unless an address rule names them. An IPv4 address inside an IPv6 one (NAT64, 6to4, …) must
        pass by itself as well.
Rule 4: where paths decide, a path that servers read in more than one way is refused, and so is a
        header that overrides it; where methods decide, one that overrides the method. Allowing is
        strict, denying generous.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar
from urllib.parse import unquote_to_bytes

from taskvm.egress.hostpattern import AddressRule, HostPattern, contains, parse_public_host
from taskvm.egress.pathpattern import AmbiguousPathError, PathPattern, plain_segments
from taskvm.egress.policyfile import (
    MAX_FILE,
    KeyPath,
    PolicyDocument,
    RuleTable,
    find_line,
    parse_document,
    render_document,
)
from taskvm.errors import UsageError
from taskvm.wire.address import embedded_ipv4, special_range
from taskvm.wire.hostname import IPAddress, parse_address

Scheme = Literal["http", "https"]
MAX_NAME = 100  # characters of a rule's name: it is in every line of the audit log

# What servers take for the method, instead of the one in the request line: Laravel, Symfony. PHP leaves out spaces
# before a parameter's name, takes a dot for _ and a NUL for the name's end.
_METHOD_PARAMETER = re.compile(rb"[?&;][ +]*[_.]method[=\0\[]")
_METHOD = re.compile(r"[A-Z][A-Z-]{0,31}\Z")
_NAME = re.compile(r"[^\x00-\x1f\x7f]+\Z")
Parsed = TypeVar("Parsed")


class _Reader(Protocol):
    """Reads a text of a file with `parse`; a mistake gets the file's name and line."""

    def __call__(self, where: KeyPath, parse: Callable[[str], Parsed], entry: str) -> Parsed: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy says: `rule` names what decided, `hint` is what a person can do."""

    allowed: bool
    rule: str
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Intent:
    """A request, as far as rules speak of it. `target` is as it is sent, query and all.

    `overrides_method`, `overrides_path`: a header asks the server to take another one than it sees.
    """

    scheme: Scheme
    host: str
    port: int
    method: str = "GET"
    target: bytes = b"/"
    overrides_method: bool = False
    overrides_path: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """Allows or denies the requests that it names. What it leaves empty, it does not ask about.

    `name` is shown wherever the rule decides. GET means HEAD too.
    """

    name: str
    allow: bool
    hosts: tuple[HostPattern, ...]
    scheme: Scheme | None = None
    methods: tuple[str, ...] = ()
    paths: tuple[PathPattern, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether it speaks of every request to its hosts."""
        return self.scheme is None and not self.methods and not self.paths

    def names_host(self, host: str, port: int | None) -> bool:
        """Say whether the host is one of its hosts. `port` None asks: on any port?"""
        return any(pattern.matches(host, port) for pattern in self.hosts)

    def names(self, intent: Intent, segments: tuple[str, ...]) -> bool:
        """Say whether the request, whose path has these segments, is one that it speaks of."""
        return (
            self.names_host(intent.host, intent.port)
            and self.scheme in (None, intent.scheme)
            and (not self.methods or self._names_method(intent.method))
            and (not self.paths or self._names_path(segments))
        )

    def _names_method(self, method: str) -> bool:
        if not self.allow:
            method = method.upper()  # some servers take "delete" for DELETE
        return method in self.methods or (method == "HEAD" and "GET" in self.methods)

    def _names_path(self, segments: tuple[str, ...]) -> bool:
        return any(path.matches(segments, generous=not self.allow) for path in self.paths)


@dataclass(frozen=True, slots=True)
class Policy:
    """What one sandbox may reach: the first rule that names a request decides. `Policy()` denies all.

    Make one with `parse` or `from_file`. `allow_addresses` lets allowed names, and literals, reach
    addresses that are otherwise refused.
    """

    rules: tuple[Rule, ...] = ()
    allow_addresses: tuple[AddressRule, ...] = ()

    @classmethod
    def parse(cls, allow: Iterable[str] = (), allow_addresses: Iterable[str] = ()) -> Policy:
        """Read a policy as a person writes it: hosts, each with `:port` or not.

        Raises UsageError that names the rule it cannot read.
        """
        return cls(
            _parse_each("allow", allow, _allow_host),
            _parse_each("allow_addresses", allow_addresses, AddressRule.parse),
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy file, TOML or JSON (docs/policy.md).

        Raises UsageError that names the file and the line of what it cannot read.
        """
        name = os.fspath(path)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE + 1)
        except OSError as error:
            reason = error.strerror or "it cannot be read"
            raise UsageError(f"read the policy file {name}", reason) from error
        if len(data) > MAX_FILE:
            raise UsageError(f"read the policy file {name}", f"it has more than {MAX_FILE} bytes")
        try:
            return cls.from_text(data.decode("utf-8"), name)
        except UnicodeDecodeError as error:
            raise UsageError(f"read the policy file {name}", "it is not UTF-8 text") from error

    @classmethod
    def from_text(cls, text: str, name: str = "policy") -> Policy:
        """Read the text of a policy file; `name` is what errors call it. Raises UsageError."""
        document = parse_document(text, name)

        def at(where: KeyPath, parse: Callable[[str], Parsed], entry: str) -> Parsed:
            try:
                return parse(entry)
            except UsageError as error:
                operation = f"read the policy file {name}, line {find_line(text, where)}"
                cause = f"{error.operation}: {error.cause}"
                raise UsageError(operation, cause, error.next_step) from error

        rules = [_read_rule(table, n, at) for n, table in enumerate(document.rules)]
        rules += [at(("allow", n), _allow_host, entry) for n, entry in enumerate(document.allow)]
        addresses = enumerate(document.allow_addresses)
        return cls(
            tuple(rules),
            tuple(at(("allow_addresses", n), AddressRule.parse, entry) for n, entry in addresses),
        )

    def allowing(self, *hosts: str) -> Policy:
        """Return this policy with further hosts allowed, after all its rules. Raises UsageError."""
        return replace(self, rules=(*self.rules, *map(_allow_host, hosts)))

    def denying(self, *hosts: str) -> Policy:
        """Return this policy with these hosts denied, before all its rules. Raises UsageError."""
        denied = tuple(Rule(f"deny {host}", False, (HostPattern.parse(host),)) for host in hosts)
        return replace(self, rules=(*denied, *self.rules))

    def joined(self, other: Policy) -> Policy:
        """Return a policy with the rules of `other` after its own."""
        return replace(
            self,
            rules=(*self.rules, *other.rules),
            allow_addresses=(*self.allow_addresses, *other.allow_addresses),
        )

    def covers(self, pattern: HostPattern) -> bool:
        """Say whether requests to all of `pattern` may be allowed (by one rule)."""
        allowed = (host for rule in self.rules if rule.allow for host in rule.hosts)
        if any(host.covers(pattern) for host in allowed):
            return True
        return pattern.network is not None and any(
            contains(rule.network, pattern.network) and rule.port in (None, pattern.port)
            for rule in self.allow_addresses
        )

    def is_silent_about(self, host: str) -> bool:
        """Say whether no rule names the host, on any port, to allow or to deny it."""
        return not any(rule.names_host(host, None) for rule in self.rules)

    def keeps(self, newer: Policy, host: str, port: int) -> bool:
        """Say whether all that this policy has allowed to `host` is surely allowed by `newer` too.

        True for rules that are the same, or the same with further ones after them.
        """
        if not set(self.allow_addresses) <= set(newer.allow_addresses):
            return False
        if not newer._denied_networks <= self._denied_networks:
            return False  # the host may have such an address
        before = [rule for rule in self.rules if rule.names_host(host, port)]
        after = [rule for rule in newer.rules if rule.names_host(host, port)]
        if after == before or newer.allows_all(host, port):
            return True
        # What no rule names may have been allowed by an address rule: a literal's new rules count.
        is_name = parse_address(host) is None
        return is_name and bool(before) and after[: len(before)] == before

    @property
    def _denied_networks(self) -> set[HostPattern]:
        denying = (rule for rule in self.rules if not rule.allow and rule.is_whole)
        return {host for rule in denying for host in rule.hosts if host.network is not None}

    def allows_all(self, host: str, port: int) -> bool:
        """Say whether the first rule that names this host and port allows every request to it."""
        first = next((rule for rule in self.rules if rule.names_host(host, port)), None)
        return first is not None and first.allow and first.is_whole

    def to_toml(self) -> str:
        """Return the policy file that means this policy."""
        last = max((n for n, rule in enumerate(self.rules, 1) if not _is_plain(rule)), default=0)
        return render_document(
            PolicyDocument(
                rules=tuple(_write_rule(rule) for rule in self.rules[:last]),
                allow=tuple(rule.name for rule in self.rules[last:]),
                allow_addresses=tuple(str(rule) for rule in self.allow_addresses),
            )
        )


# Deciding.


def decide_name(policy: Policy, host: str, port: int | None) -> Decision:
    """Judge a canonical host name or IP literal before anything is looked up: may any request go there?

    `port` None asks for any port (DNS).
    """
    for rule in policy.rules:
        if rule.names_host(host, port) and (rule.allow or (rule.is_whole and port is not None)):
            return _decided(rule, host, port)
        if not rule.allow and rule.is_whole and _denies_every_port(rule, host):
            return _decided(rule, host, port)
    if (by_address := _address_decision(policy, host, port)) is not None:
        return by_address
    if port is not None and any(
        rule.allow and rule.names_host(host, None) for rule in policy.rules
    ):
        return Decision(
            False, "port", "the host is allowed on another port only",
            f'Ask the owner of this sandbox to allow "{host}:{port}"',
        )  # fmt: skip
    return Decision(
        False, "default", "no rule allows this host",
        f'Ask the owner of this sandbox to allow "{host}"',
    )  # fmt: skip


def decide_request(policy: Policy, intent: Intent) -> Decision:
    """Judge one request to a canonical host."""
    by_name = decide_name(policy, intent.host, intent.port)
    if not by_name.allowed:
        return by_name
    speaking = [rule for rule in policy.rules if rule.names_host(intent.host, intent.port)]
    segments: tuple[str, ...] = ()
    if any(rule.paths for rule in speaking):
        try:
            segments = plain_segments(intent.target)
        except AmbiguousPathError as error:
            return _ambiguous("path", f"the path can be read in more than one way: {error}")
        if intent.overrides_path:
            return _ambiguous("path", "a header overrides the request's path")
    if any(rule.methods for rule in speaking) and _overrides_method(intent):
        return _ambiguous("method", "a header or the query overrides the request's method")
    for rule in speaking:
        if rule.names(intent, segments):
            return _decided(rule, intent.host, intent.port)
    if (by_address := _address_decision(policy, intent.host, intent.port)) is not None:
        return by_address
    return Decision(
        False, "default", f"no rule allows {intent.method} of this path on this host",
        f'Ask the owner of this sandbox for a rule that allows it on "{intent.host}"',
    )  # fmt: skip


def decide_address(policy: Policy, host: str, ip: IPAddress, port: int) -> Decision:
    """Judge one address that the allowed `host` has (or is). The reason never names the address."""
    for rule in policy.rules:
        if not rule.allow and rule.is_whole and rule.names_host(str(ip), port):
            return Decision(False, rule.name, "a rule denies the host's address")
    by_rule = _named(policy, ip, port)
    label = special_range(ip)
    embedded = embedded_ipv4(ip)
    if label and by_rule is None:
        return _deny_special(label)
    if embedded is not None:
        inner = special_range(embedded)
        if inner and _named(policy, embedded, port) is None:
            return _deny_special(inner)
    if by_rule is not None:
        return Decision(True, str(by_rule), "an address rule allows it")
    return Decision(True, "public", f"{host} has a public address")


def _overrides_method(intent: Intent) -> bool:
    by_query = _METHOD_PARAMETER.search(unquote_to_bytes(intent.target))
    return intent.overrides_method or by_query is not None


def _decided(rule: Rule, host: str, port: int | None) -> Decision:
    if rule.allow:
        what = "the host is allowed" if rule.is_whole else "a rule allows it"
        return Decision(True, rule.name, what)
    shown = host if port is None else f"{host}:{port}"
    return Decision(
        False, rule.name, "a rule denies it", f'Ask the owner of this sandbox about "{shown}"'
    )


def _denies_every_port(rule: Rule, host: str) -> bool:
    return any(pattern.port is None and pattern.matches(host) for pattern in rule.hosts)


def _address_decision(policy: Policy, host: str, port: int | None) -> Decision | None:
    address = parse_address(host)
    by_rule = None if address is None or port is None else _named(policy, address, port)
    return None if by_rule is None else Decision(True, str(by_rule), "the address is allowed")


def _ambiguous(what: str, reason: str) -> Decision:
    return Decision(
        False, f"ambiguous-{what}", reason, f"Write the {what} plainly, and ask for it again"
    )


def _deny_special(label: str) -> Decision:
    return Decision(
        False,
        "special-address",
        f"the host's address is not a public one ({label})",
        "Ask the owner of this sandbox for an address rule",
    )


def _named(policy: Policy, ip: IPAddress, port: int) -> AddressRule | None:
    return next((rule for rule in policy.allow_addresses if rule.matches(ip, port)), None)


# Reading rules.


def _allow_host(text: str) -> Rule:
    pattern = parse_public_host(text)
    return Rule(str(pattern), True, (pattern,))


def _parse_each(
    argument: str, texts: Iterable[str], parse: Callable[[str], Parsed]
) -> tuple[Parsed, ...]:
    if isinstance(texts, str):
        raise UsageError(
            f"read the policy's {argument}", "it is one text", f"Write a list: [{texts!r}]"
        )
    return tuple(parse(text) for text in texts)


def _read_rule(table: RuleTable, number: int, at: _Reader) -> Rule:
    place: KeyPath = ("rules", number)
    allow = table.action == "allow"
    read_host = parse_public_host if allow else HostPattern.parse

    def read(
        key: str, texts: tuple[str, ...], parse: Callable[[str], Parsed]
    ) -> tuple[Parsed, ...]:
        return tuple(at((*place, key, n), parse, text) for n, text in enumerate(texts))

    at((*place, "hosts"), _check_hosts, " ".join(table.hosts))
    return Rule(
        name=at((*place, "name"), _check_name, table.name or f"rule {number + 1}"),
        allow=allow,
        hosts=read("hosts", table.hosts, read_host),
        scheme=table.scheme,
        methods=read("methods", table.methods, _check_method),
        paths=read("paths", table.paths, PathPattern.parse),
    )


def _check_hosts(text: str) -> str:
    if not text:
        raise UsageError("read a rule", "it names no host", 'Write hosts = ["api.example.com"]')
    return text


def _check_name(text: str) -> str:
    if len(text) > MAX_NAME or not _NAME.match(text):
        raise UsageError(
            f"name a rule {text[:MAX_NAME]!r}",
            f"it is longer than {MAX_NAME} characters, or has control characters",
        )
    return text


def is_method(text: str) -> bool:
    """Say whether a rule can name this method."""
    return _METHOD.match(text) is not None


def _check_method(text: str) -> str:
    if not is_method(text):
        raise UsageError(f"read the method {text!r}", "it is not a word like GET, in capitals")
    return text


def _is_plain(rule: Rule) -> bool:
    return rule.allow and rule.is_whole and [rule.name] == [str(host) for host in rule.hosts]


def _write_rule(rule: Rule) -> RuleTable:
    return RuleTable(
        name=rule.name,
        action="allow" if rule.allow else "deny",
        hosts=tuple(map(str, rule.hosts)),
        scheme=rule.scheme,
        methods=rule.methods,
        paths=tuple(map(str, rule.paths)),
    )
