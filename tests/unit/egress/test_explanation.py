"""What a policy would do (taskvm.egress.explanation, taskvm.cli.policy): the same decisions, without a packet."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from taskvm import Policy, UsageError, explain
from taskvm.cli.commands import main

POLICY = Policy.parse(["api.test", "1.1.1.1"]).denying("api.test:81")


@pytest.mark.parametrize(
    ("url", "allowed", "rule"),
    [
        ("https://api.test", True, "api.test"),
        ("HTTPS://API.test.:443/x?y#z", True, "api.test"),
        ("wss://api.test/socket", True, "api.test"),
        ("http://api.test:81/", False, "deny api.test:81"),
        ("https://evil.test/", False, "default"),
        ("https://1.1.1.1/", True, "public"),
        ("https://127.0.0.1/", False, "default"),
    ],
)
def test_the_rule_that_decides_is_named(url: str, allowed: bool, rule: str) -> None:
    explanation = explain(POLICY, url)

    assert explanation.allowed is allowed
    assert explanation.steps[-1].decision.rule == rule


@pytest.mark.parametrize(
    ("url", "method", "rule", "word"),
    [
        ("https://api.test/", "CONNECT", "http", "CONNECT"),
        ("https://api.test/", "Trace", "http", "TRACE"),
        ("https://api.test/a\\b", "GET", "http", "target"),
        ("https://api.test/", "GE T", "http", "method"),
        ("https://[2606:4700::1111]/", "GET", "no-ipv6", "IPv6"),
    ],
)
def test_what_the_gateway_itself_refuses_is_refused(
    url: str, method: str, rule: str, word: str
) -> None:
    explanation = explain(POLICY.allowing("2606:4700::1111"), url, method=method)

    assert not explanation.allowed
    assert explanation.steps[-1].decision.rule == rule
    assert word in explanation.steps[-1].decision.reason


@pytest.mark.parametrize(
    ("query", "allowed"),
    [("?method=a&b=c", True), ("?_method=DELETE", False), ("?a=b&%2emethod=DELETE", False)],
)
def test_a_query_that_overrides_the_method_is_refused_here_too(query: str, allowed: bool) -> None:
    policy = Policy.from_text(
        '[[rules]]\naction = "allow"\nhosts = ["api.test"]\nmethods = ["GET"]\n'
    )

    explanation = explain(policy, f"https://api.test/v1{query}")

    assert explanation.allowed is allowed
    assert explanation.steps[-1].decision.rule == ("rule 1" if allowed else "ambiguous-method")


def test_an_internationalized_name_is_that_of_its_rule() -> None:
    explanation = explain(Policy.parse(["bücher.example"]), "https://bücher.example:443/")

    assert explanation.allowed
    assert explanation.request == "GET https://xn--bcher-kva.example/"


@pytest.mark.parametrize(
    ("policy", "allowed"), [(POLICY, True), (POLICY.denying("api.test:443"), False)]
)
def test_what_is_passed_through_is_judged_as_a_whole(policy: Policy, allowed: bool) -> None:
    explanation = explain(policy, "https://api.test/x", method="PUT", passthrough=["api.test"])
    clear = explain(policy, "http://api.test/x", passthrough=["api.test"])

    assert explanation.allowed is allowed
    assert ("tls" in [step.subject for step in explanation.steps]) is allowed
    assert clear.steps[-1].subject == "request"
    with pytest.raises(UsageError, match="not within the allowed hosts"):
        explain(policy, "https://api.test/", passthrough=["other.test"])


def test_a_known_address_is_judged() -> None:
    explanation = explain(POLICY, "https://api.test/", resolve={"api.test": "169.254.169.254"})

    assert not explanation.allowed
    assert explanation.steps[-1].decision.rule == "special-address"


def test_of_several_addresses_one_that_is_allowed_is_enough() -> None:
    """It is the one that is connected to; what is refused is shown before it."""
    table = {"API.test": "192.0.2.1,93.184.216.34,10.0.0.1"}

    explanation = explain(POLICY, "https://api.test/", resolve=table)

    said = [step.decision.allowed for step in explanation.steps if step.subject == "address"]
    assert said == [False, False, True]
    assert explanation.allowed


@pytest.mark.parametrize(
    "url", ["api.test", "ftp://api.test/", "https://a@api.test/", "https:///x", "https://[::1", "https://a.test/ b"]
)  # fmt: skip
def test_what_is_no_url_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match="read the URL"):
        explain(POLICY, url)


def test_check_says_the_rule_and_exits_with_the_answer(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text(
        '[[rules]]\nname = "read"\naction = "allow"\nhosts = ["api.test"]\nmethods = ["GET"]\n'
    )
    arguments = ["policy", "check", "--policy", str(file), "--allow", "b.test"]
    runner = CliRunner()

    read = runner.invoke(main, [*arguments, "https://api.test/x"])
    write = runner.invoke(main, [*arguments, "https://api.test/x", "--method", "post"])
    other = runner.invoke(main, [*arguments, "https://b.test/"])

    assert (read.exit_code, write.exit_code, other.exit_code) == (0, 1, 0)
    assert "allow by read" in read.output
    assert "POST https://api.test/x" in write.output
    assert "no rule allows POST" in write.output
    assert runner.invoke(main, [*arguments, "nonsense"]).exit_code == 2


def test_show_prints_a_file_that_means_the_same(tmp_path: Path) -> None:
    arguments = ["policy", "show", "--allow", "a.test:8443", "--allow-address", "127.0.0.1"]

    shown = CliRunner().invoke(main, arguments)

    assert Policy.from_text(shown.output) == Policy.parse(["a.test:8443"], ["127.0.0.1"])
