"""taskvm.vm.eventrate: bursts pass, a flood does not."""

from taskvm.vm.eventrate import MAX_EVENTS, SPAN_S, EventRate


def test_a_burst_passes_and_a_flood_does_not() -> None:
    rate = EventRate()

    verdicts = [rate.exceeds(1.0) for _ in range(MAX_EVENTS + 1)]

    assert verdicts == [False] * MAX_EVENTS + [True]


def test_each_span_counts_anew() -> None:
    rate = EventRate()
    for _ in range(MAX_EVENTS):
        rate.exceeds(1.0)

    assert not rate.exceeds(1.0 + 2 * SPAN_S)
