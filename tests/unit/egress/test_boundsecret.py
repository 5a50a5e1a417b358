"""Placeholders and their secrets (taskvm.egress.boundsecret)."""

from __future__ import annotations

import os
import re

import pytest

from taskvm.egress.boundsecret import MAX_FORMER, bind_secret, bind_secrets
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.errors import UsageError

POLICY = Policy.parse(["api.test"])


def test_a_placeholder_has_the_shape_that_is_asked_for() -> None:
    secret = Secret("GH", "value", hosts=["api.test"], shape="ghp_" + 36 * "*")

    first, second = (bind_secret(POLICY, secret, os.urandom).placeholder for _ in range(2))

    assert re.fullmatch("ghp_[A-Za-z0-9]{36}", first)
    assert first != second


@pytest.mark.parametrize("shape", ["ghp_", "*" * 15, "a b" + "*" * 20, "%" + "*" * 20, "*" * 300])
def test_a_shape_that_could_be_guessed_or_escaped_is_refused(shape: str) -> None:
    with pytest.raises(UsageError, match="shape"):
        Secret("GH", "value", hosts=["api.test"], shape=shape)


def test_a_place_is_one_of_three() -> None:
    with pytest.raises(UsageError, match="places"):
        Secret("GH", "value", hosts=["api.test"], places=["cookie"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="places"):
        Secret("GH", "value", hosts=["api.test"], places="query")  # type: ignore[arg-type]


def test_former_values_are_bounded_and_none_is_shown() -> None:
    bound = bind_secret(POLICY, Secret("K", "value-0", hosts=["api.test"]), os.urandom)
    for number in range(1, 40):
        bound = bound.rotated(Secret("K", f"value-{number}", hosts=["api.test"]), POLICY)

    assert len(bound.values) == MAX_FORMER + 1
    assert "value-" not in repr(bound)


def test_a_former_value_that_is_part_of_the_new_one_is_not_looked_for() -> None:
    bound = bind_secret(POLICY, Secret("K", "token-12", hosts=["api.test"]), os.urandom)

    longer = bound.rotated(Secret("K", "token-123", hosts=["api.test"]), POLICY)

    assert longer.values == (b"token-123",)


def test_a_revoked_secret_comes_back_when_it_is_given_again() -> None:
    secret = Secret("K", "token-12", hosts=["api.test"])
    (bound,) = bind_secrets(POLICY, [secret], os.urandom)

    assert not bound.withdrawn().may_go_to("https", "api.test", 443)
    assert bound.withdrawn().rotated(secret, POLICY).may_go_to("https", "api.test", 443)
