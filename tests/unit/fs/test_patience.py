"""Waiting with one deadline and a way to give it up, and answers that are counted (taskvm.fs.patience)."""

import threading

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm.fs.patience import Answers, Patience


def test_what_happens_is_waited_for_and_what_does_not_has_an_end() -> None:
    """The deadline is one for all that is waited for; what is there already needs none."""
    happened = threading.Event()
    threading.Timer(0.1, happened.set).start()

    Patience(PATIENCE_S).wait(happened.wait, "it did not happen")
    Patience(0).wait(happened.wait, "it did not happen")
    with pytest.raises(TimeoutError, match="it did not happen"):
        Patience(0.01).wait(threading.Event().wait, "it did not happen")


def test_what_is_given_up_ends_at_once() -> None:
    given_up = threading.Event()
    threading.Timer(0.1, given_up.set).start()

    with pytest.raises(TimeoutError, match="nobody waits"):
        Patience(PATIENCE_S * 10, given_up).wait(threading.Event().wait, "nobody waits")


def test_answers_are_those_of_their_own_questions() -> None:
    answers = Answers()
    first, second = answers.ask(), answers.ask()

    assert answers.take()
    assert answers.wait_for(first, 0)
    assert not answers.wait_for(second, 0.01)
    answers.end()
    assert answers.wait_for(second, 0)
    assert answers.take()
    assert not answers.take()
