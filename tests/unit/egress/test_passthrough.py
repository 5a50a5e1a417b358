"""Which hosts may be passed through: taskvm.egress.passthrough."""

from __future__ import annotations

import pytest

from taskvm.egress.passthrough import NOTHING, Passthrough
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.errors import UsageError

POLICY = Policy.parse(["pinned.test", "*.cdn.test:443", "api.test", "*.sub.test"], ["10.0.0.1"])


def test_a_pattern_names_hosts_with_their_ports() -> None:
    passthrough = Passthrough.parse(["pinned.test", "*.cdn.test:443"], POLICY)

    assert passthrough.names("pinned.test", 8443)
    assert passthrough.names("a.cdn.test", 443)
    assert not passthrough.names("a.cdn.test", 8443)
    assert not passthrough.names("api.test", 443)
    assert passthrough
    assert not NOTHING


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("other.test", "not within the allowed hosts"),
        ("*.cdn.test", "not within the allowed hosts"),
        ("10.0.0.1", "it is an address"),
        ("https://pinned.test", "it is a URL"),
    ],
)
def test_what_cannot_be_passed_through_is_refused(text: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        Passthrough.parse([text], POLICY)


@pytest.mark.parametrize(
    ("host", "secret_host"),
    [("api.test", "api.test"), ("api.test:443", "api.test"), ("*.cdn.test:443", "a.cdn.test:443"),
     ("a.cdn.test:443", "*.cdn.test:443"), ("a.sub.test", "*.sub.test:443"), ("*.sub.test:8443", "a.sub.test")],
)  # fmt: skip
def test_a_secret_and_a_passage_exclude_each_other(host: str, secret_host: str) -> None:
    secret = Secret("KEY", "a-value-of-a-secret", hosts=[secret_host])

    with pytest.raises(UsageError, match="the secret 'KEY' is for") as caught:
        Passthrough.parse([host], POLICY, [secret])

    assert "a-value" not in str(caught.value)


def test_another_port_of_the_same_host_is_another_server() -> None:
    secret = Secret("KEY", "a-value-of-a-secret", hosts=["api.test:8443"])

    assert Passthrough.parse(["api.test:443"], POLICY, [secret])


def test_one_text_is_no_list() -> None:
    with pytest.raises(UsageError, match="one text"):
        Passthrough.parse("pinned.test", POLICY)
