"""A policy from a log (taskvm.egress.suggestion, taskvm.cli.log): it allows what was used."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from taskvm.cli.commands import main
from taskvm.egress.audit import AuditEvent, render_event, render_time
from taskvm.egress.policy import Intent, Policy, decide_request
from taskvm.egress.suggestion import MAX_PATHS, suggest_policy


def event(kind: str, decision: str = "allow", **fields: object) -> AuditEvent:
    known = {"time": render_time(0), "sandbox": "box", "kind": kind, "decision": decision}
    return AuditEvent(**(known | fields))  # type: ignore[arg-type]  # as the test gives them


def asked(path: str, method: str = "GET", host: str = "api.test") -> AuditEvent:
    return event("request", scheme="https", host=host, port=443, method=method, path=path)


def patterns(*paths: str) -> list[str]:
    (rule,) = suggest_policy([asked(path) for path in paths]).policy.rules
    return [str(path) for path in rule.paths]


def test_few_paths_are_exact_and_many_are_widened() -> None:
    many = [f"/repos/acme/shop/issues/{number}" for number in range(MAX_PATHS + 1)]

    assert patterns("/a", "/b/c") == ["/a", "/b/c"]
    assert patterns(*many, "/user") == ["/repos/acme/shop/issues/**", "/user"]


def test_what_no_pattern_can_say_is_widened() -> None:
    assert patterns("/a/b%20c/d") == ["/a/**"]
    assert patterns("/a/b*c") == ["/a/**"]
    assert patterns("/a/../b") == []
    assert patterns("/") == ["/"]


def test_an_address_rule_that_was_needed_is_suggested_and_refusals_are_told() -> None:
    events = [
        asked("/"),
        event("connect", rule="127.0.0.1", host="api.test", address="127.0.0.1", port=443),
        event("connect", rule="public", host="b.test", address="8.8.8.8", port=443),
        *[event("dns", "deny", host="evil.test")] * 2,
        event("dns", "deny", host="api.test", rule="dns-type"),
    ]

    suggestion = suggest_policy(events)

    assert [str(rule) for rule in suggestion.policy.allow_addresses] == ["127.0.0.1:443"]
    assert suggestion.to_toml().endswith("# refused 2 times: evil.test\n")
    assert Policy.from_text(suggestion.to_toml()) == suggestion.policy


def test_a_host_that_was_passed_through_is_allowed_as_a_whole() -> None:
    passage = {"host": "pinned.test", "port": 443, "rule": "passthrough"}
    events = [event("tls", **passage), asked("/x", host="pinned.test"), event("tls", **passage)]

    suggestion = suggest_policy(events)

    policy = Policy.from_text(suggestion.to_toml())
    assert policy == suggestion.policy
    assert policy.allows_all("pinned.test", 443)
    assert "passthrough too: pinned.test:443" in suggestion.to_toml()


def test_what_a_guest_writes_makes_no_file_that_cannot_be_read() -> None:
    """A method in lower case, or a word of a guest's own; a name longer than a rule's may be."""
    long = ".".join(["a" * 60] * 4)
    events = [
        *(asked("/x", method) for method in ("get", "GET", 'A"]\n', "GET...", "")),
        asked("/y", "get", host="other.test"),
        asked("/z", host=long),
    ]

    suggestion = suggest_policy(events)

    policy = Policy.from_text(suggestion.to_toml())
    assert {rule.hosts[0].host: rule.methods for rule in policy.rules} == {
        "api.test": ("GET",),
        long: ("GET",),
    }
    assert "# not allowed here, asked by a method" in suggestion.to_toml()


PATH = st.lists(st.text("ab*%2 .é", max_size=3), max_size=4).map(
    lambda parts: "/" + "/".join(parts)
)
EVENT = st.builds(
    asked, PATH, st.sampled_from(["GET", "HEAD", "POST"]), st.sampled_from(["api.test", "8.8.8.8"])
)


@given(st.lists(EVENT, max_size=30))
def test_a_suggestion_allows_every_request_that_was_allowed(events: list[AuditEvent]) -> None:
    policy = Policy.from_text(suggest_policy(events).to_toml())

    for each in events:
        intent = Intent("https", each.host, 443, each.method, each.path.encode())
        assert decide_request(policy, intent).allowed
        assert not decide_request(policy, Intent("https", each.host, 444, "GET", b"/")).allowed
        assert not decide_request(policy, Intent("https", each.host, 443, "PUT", b"/")).allowed
    assert all(len(rule.paths) <= MAX_PATHS for rule in policy.rules)


def test_log_and_suggest_read_a_file(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    events = [
        asked("/v1"),
        event("dns", "deny", host="evil.test", rule="default", reason="no rule"),
    ]
    log.write_bytes(b"".join(map(render_event, events)))

    printed = CliRunner().invoke(main, ["log", str(log)]).output
    denied = CliRunner().invoke(main, ["log", "--denied", str(log)]).output
    as_json = CliRunner().invoke(main, ["log", "--json", str(log)]).output
    policy = CliRunner().invoke(main, ["policy", "suggest", str(log)]).output

    assert printed.splitlines() == [
        "00:00:00.000 allow request  GET https://api.test:443/v1",
        "00:00:00.000 deny  dns      evil.test (default: no rule)",
    ]
    assert denied == printed.splitlines()[1] + "\n"
    assert as_json.encode() == log.read_bytes()
    assert "# refused 1 times: evil.test" in policy
    assert Policy.from_text(policy).rules[0].name == "use api.test:443"
