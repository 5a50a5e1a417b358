"""The shapes that refusals take."""

from __future__ import annotations

from taskvm.egress.policy import Policy, decide_name
from taskvm.net.egress import UNRECORDED, Refusal


def test_a_denial_becomes_an_answer_that_says_how_to_ask() -> None:
    refusal = Refusal.of(decide_name(Policy(), "a.test", 443))

    assert (refusal.status, refusal.kind, refusal.rule) == (403, "egress_denied", "default")
    assert '"a.test"' in refusal.hint


def test_what_cannot_be_recorded_is_a_denial() -> None:
    assert not UNRECORDED.allowed
    assert Refusal.of(UNRECORDED).rule == "audit"
