"""taskvm.supervisor.idleness: when nothing happens in a sandbox that is held."""

import pytest

from taskvm.supervisor.idleness import Idleness, Look


def look(now_s: float, *, moved: int = 0, busy: bool = False, cpu_s: float = 0.0) -> Look:
    return Look(now_s=now_s, moved=moved, busy=busy, cpu_s=cpu_s)


def test_time_passes_while_nothing_happens() -> None:
    """A guest at its prompt takes a little processor time."""
    idleness = Idleness(look(100))

    assert idleness.idle_s(look(101, cpu_s=0.01)) == 1
    assert idleness.idle_s(look(110, cpu_s=0.1)) == 10


@pytest.mark.parametrize(
    "active", [look(105, moved=1), look(105, busy=True), look(105, cpu_s=4.0)], ids=repr
)
def test_a_byte_a_client_or_work_is_activity(active: Look) -> None:
    """Each of them alone begins the time anew."""
    idleness = Idleness(look(100))

    assert idleness.idle_s(active) == 0
    after = Look(now_s=107, moved=active.moved, busy=False, cpu_s=active.cpu_s)
    assert idleness.idle_s(after) == 2
