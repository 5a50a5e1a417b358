"""The policy: what its patterns mean, and that nothing but a rule allows anything."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.egress.hostpattern import HostPattern
from taskvm.egress.pathpattern import PathPattern
from taskvm.egress.policy import Intent, Policy, Rule, decide_address, decide_name, decide_request
from taskvm.errors import UsageError

LABEL = st.from_regex(r"[a-z]{1,3}", fullmatch=True)
HOST = st.sampled_from(["api.test", "a.api.test", "b.api.test", "other.test", "8.8.8.8"])
METHOD = st.sampled_from(["GET", "HEAD", "POST", "DELETE"])
PATH = st.lists(LABEL, max_size=3).map(lambda parts: "/" + "/".join(parts))
PATTERN = st.sampled_from(
    ["api.test", "*.api.test", "api.test:8443", "other.test", "8.8.0.0/16:8443"]
)
RULE = st.builds(
    Rule,
    name=st.just("r"),
    allow=st.booleans(),
    hosts=st.lists(PATTERN.map(HostPattern.parse), min_size=1, max_size=2).map(tuple),
    scheme=st.sampled_from([None, "http", "https"]),
    methods=st.lists(METHOD, max_size=2).map(tuple),
    paths=st.lists(
        st.sampled_from(["/a", "/a/**", "/*/b", "/**"]).map(PathPattern.parse), max_size=2
    ).map(tuple),
)
POLICY = st.lists(RULE, max_size=4).map(lambda rules: Policy(tuple(rules)))
INTENT = st.builds(
    Intent,
    scheme=st.sampled_from(["http", "https"]),
    host=HOST,
    port=st.sampled_from([443, 8443]),
    method=METHOD,
    target=PATH.map(str.encode),
)
FILE = """
allow = ["index.example.org"]
allow_addresses = ["127.0.0.1:8443"]

[[rules]]
name = "no admin"
action = "deny"
hosts = ["api.test"]
paths = ["/admin/**"]

[[rules]]
name = "read"
action = "allow"
hosts = ["api.test"]
scheme = "https"
methods = ["GET"]
paths = ["/repos/*/issues", "/admin/open"]

[[rules]]
action = "allow"
hosts = ["*.api.test:8443"]
"""


def ask(policy: Policy, method: str, url: str, *, overrides: bool = False) -> bool:
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    name, _, port = host.partition(":")
    target = (slash + path or "/").encode()
    assert scheme in ("http", "https")
    intent = Intent(scheme, name, int(port or 443), method, target, overrides)
    return decide_request(policy, intent).allowed


def test_an_empty_policy_denies_all() -> None:
    policy = Policy()

    for host in ("example.com", "127.0.0.1", "8.8.8.8", "::1"):
        assert not decide_name(policy, host, 443).allowed
        assert not decide_name(policy, host, None).allowed


@pytest.mark.parametrize("text", ["127.0.0.1", "10.0.0.0/8:443", "[::1]:80", "169.254.169.254"])
def test_an_internal_address_is_allowed_by_an_address_rule_only(text: str) -> None:
    with pytest.raises(UsageError, match="allow_addresses"):
        Policy.parse([text])

    assert Policy.parse([], [text]).allow_addresses


def test_one_text_is_not_a_list_of_letters() -> None:
    with pytest.raises(UsageError, match="list"):
        Policy.parse(allow="example.com")


def test_a_denial_says_how_to_ask() -> None:
    policy = Policy.parse(["example.com:8443"])

    assert '"other.com"' in decide_name(policy, "other.com", 443).hint
    assert decide_name(policy, "example.com", 443).rule == "port"
    assert decide_name(policy, "example.com", None).allowed


def test_an_address_rule_lets_a_literal_in_and_no_name() -> None:
    policy = Policy.parse([], ["10.0.0.0/8:5432"])

    assert decide_name(policy, "10.1.2.3", 5432).allowed
    assert not decide_name(policy, "10.1.2.3", 22).allowed
    assert not decide_name(policy, "db.example.com", 5432).allowed


@pytest.mark.parametrize(
    ("rules", "address", "allowed"),
    [
        ([], "8.8.8.8", True),
        ([], "127.0.0.1", False),
        (["127.0.0.1:443"], "127.0.0.1", True),
        (["127.0.0.1:80"], "127.0.0.1", False),
        (["127.0.0.1"], "::ffff:127.0.0.1", False),
        (["64:ff9b::/96"], "64:ff9b::808:808", True),
        (["64:ff9b::/96"], "64:ff9b::7f00:1", False),
        (["64:ff9b::/96", "127.0.0.1"], "64:ff9b::7f00:1", True),
        (["[::1]:443"], "::1", True),
        (["::1"], "::2", False),
    ],
)
def test_special_addresses_need_a_rule_that_names_them(
    rules: list[str], address: str, allowed: bool
) -> None:
    policy = Policy.parse(["a.com"], rules)

    decision = decide_address(policy, "a.com", ipaddress.ip_address(address), 443)

    assert decision.allowed is allowed
    assert address not in decision.reason + decision.hint


@given(st.ip_addresses(v=4), st.integers(1, 65535))
def test_no_special_address_passes_without_rules(ip: ipaddress.IPv4Address, port: int) -> None:
    decision = decide_address(Policy.parse(["a.com"]), "a.com", ip, port)

    assert not decision.allowed or ip.is_global


# Rules with methods and paths.


@pytest.mark.parametrize(
    ("method", "url", "allowed"),
    [
        ("GET", "https://api.test/repos/x/issues", True),
        ("HEAD", "https://api.test/repos/x/issues?state=open", True),
        ("GET", "https://api.test/repos/%78/issues", True),
        ("POST", "https://api.test/repos/x/issues", False),
        ("get", "https://api.test/repos/x/issues", False),
        ("GET", "http://api.test/repos/x/issues", False),
        ("GET", "https://api.test/repos/x/y/issues", False),
        ("GET", "https://api.test/repos/x/ISSUES", False),
        ("GET", "https://api.test/repos/x/issues/", False),
        ("GET", "https://api.test/", False),
        ("GET", "https://api.test/admin/open", False),  # the first rule that names it decides
        ("GET", "https://api.test/repos/../admin/issues", False),
        ("GET", "https://api.test/repos/%2e%2e/issues", False),
        ("GET", "https://api.test/repos/a%2Fb/issues", False),
        ("GET", "https://api.test/repos//issues", False),
        ("GET", "https://api.test/repos/x;y/issues", False),
        ("GET", "https://api.test/repos/%2578/issues", False),
        ("OPTIONS", "https://a.api.test:8443/anything", True),
        ("GET", "https://a.api.test/anything", False),
        (
            "DELETE",
            "https://index.example.org//odd/../path",
            True,
        ),  # no path rule: the path decides nothing
    ],
)
def test_the_first_rule_that_names_a_request_decides(method: str, url: str, allowed: bool) -> None:
    assert ask(Policy.from_text(FILE), method, url) is allowed


@pytest.mark.parametrize("path", ["/admin", "/ADMIN/x", "/admin/", "/%61dmin/x", "/Admin/x/"])
def test_a_denial_reads_a_path_as_generously_as_a_server_may(path: str) -> None:
    policy = Policy.from_text(
        '[[rules]]\naction = "deny"\nhosts = ["api.test"]\npaths = ["/admin/**"]\n'
    ).allowing("api.test")

    assert not ask(policy, "GET", f"https://api.test{path}")
    assert ask(policy, "GET", "https://api.test/other")


def test_a_header_that_overrides_the_method_is_refused_where_methods_decide() -> None:
    policy = Policy.from_text(FILE)

    assert not ask(policy, "GET", "https://api.test/repos/x/issues", overrides=True)
    assert ask(policy, "GET", "https://index.example.org/x", overrides=True)


def test_a_denied_method_is_denied_in_small_letters_too() -> None:
    policy = Policy.from_text(
        '[[rules]]\naction = "deny"\nhosts = ["api.test"]\nmethods = ["DELETE", "GET"]\n'
    ).allowing("api.test")

    assert [ask(policy, method, "https://api.test/") for method in ("delete", "HEAD", "POST")] == [
        False, False, True,
    ]  # fmt: skip


def test_a_denied_host_does_not_exist_and_a_denied_path_does() -> None:
    policy = Policy.from_text(FILE).denying("index.example.org", "b.api.test:8443")

    assert not decide_name(policy, "index.example.org", None).allowed
    assert decide_name(policy, "b.api.test", None).allowed  # another port might be allowed
    assert not decide_name(policy, "b.api.test", 8443).allowed
    assert decide_name(policy, "api.test", 443).allowed


def test_a_denied_network_is_not_reached_by_a_name() -> None:
    policy = Policy.parse(["a.com"]).denying("8.8.8.0/24")

    assert not decide_address(policy, "a.com", ipaddress.ip_address("8.8.8.8"), 443).allowed
    assert decide_address(policy, "a.com", ipaddress.ip_address("8.8.4.4"), 443).allowed


@given(POLICY, INTENT)
def test_nothing_is_allowed_but_by_the_first_rule_that_names_it(
    policy: Policy, intent: Intent
) -> None:
    segments = tuple(intent.target.decode()[1:].split("/"))
    naming = [rule for rule in policy.rules if rule.names(intent, segments)]

    decision = decide_request(policy, intent)

    assert decision.allowed is (bool(naming) and naming[0].allow)
    if decision.allowed:
        assert decide_name(policy, intent.host, intent.port).allowed
        assert decide_name(policy, intent.host, None).allowed


@given(POLICY, POLICY, INTENT)
def test_what_is_kept_stays_allowed(before: Policy, after: Policy, intent: Intent) -> None:
    """A connection that outlives a change carries nothing that the new policy denies."""
    for newer in (after, before.joined(after), after.joined(before)):
        if before.keeps(newer, intent.host, intent.port):
            allowed = decide_request(before, intent).allowed
            assert not allowed or decide_request(newer, intent).allowed


@given(POLICY)
def test_a_policy_is_what_its_file_says(policy: Policy) -> None:
    again = Policy.from_text(policy.to_toml())

    assert again == policy


def test_a_narrower_policy_keeps_nothing_of_what_it_takes_away() -> None:
    policy = Policy.parse(["a.test", "b.test"], ["127.0.0.1"])

    assert policy.keeps(policy.allowing("c.test"), "a.test", 443)
    assert policy.keeps(policy.denying("b.test"), "a.test", 443)
    assert not policy.keeps(policy.denying("b.test"), "b.test", 443)
    assert not policy.keeps(Policy.parse(["a.test"]), "a.test", 443)  # an address rule is gone
    assert not policy.keeps(policy.denying("127.0.0.1"), "127.0.0.1", 443)
    assert not policy.keeps(
        policy.denying("8.8.0.0/16"), "a.test", 443
    )  # it may have such an address
    assert policy.denying("8.8.0.0/16").keeps(policy, "a.test", 443)
