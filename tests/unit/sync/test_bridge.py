"""Calls from threads that block to the loop behind them (taskvm.sync.bridge), without a virtual machine."""

import gc
import threading
from collections.abc import Callable

import pytest

from taskvm.sync.bridge import Bridge, Call


class Interrupted:
    """The posts of a call whose thread gets Ctrl-C as soon as it waits for them."""

    def put(self, post: object) -> None:
        """Nobody waits any more."""

    def get(self) -> None:
        raise KeyboardInterrupt


def test_a_call_that_is_interrupted_before_it_has_begun_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop has its turn only then. A warning of what was never awaited is an error here, in whatever thread."""
    bridge, turn, began = Bridge.current(), threading.Event(), threading.Event()
    submit, submitted = bridge.submit, []

    def submitting(begin: Callable[[], None]) -> None:
        submitted.append(submit(begin))
        if len(submitted) == 2:  # what begins the work, and what cancels it
            turn.set()

    async def work() -> None:
        began.set()

    call = Call(bridge)
    call._posts = Interrupted()  # type: ignore[assignment]  # all that a call uses
    bridge.submit(lambda: bool(turn.wait()))
    monkeypatch.setattr(bridge, "submit", submitting)

    with pytest.raises(KeyboardInterrupt):
        call.run(work)

    gc.collect()
    assert not began.is_set()


def test_what_a_function_raises_before_it_is_awaited_is_raised_in_the_call() -> None:
    def refuse() -> None:
        raise LookupError("at once")

    with pytest.raises(LookupError, match="at once"):
        Bridge.current().call(refuse)  # type: ignore[arg-type]  # it returns nothing to await
