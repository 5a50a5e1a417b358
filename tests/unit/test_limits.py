"""taskvm.limits: a limit that exists can be held."""

import math
from pathlib import Path

import pytest

from taskvm.errors import HostError, UsageError
from taskvm.limits import LimitArguments, Limits
from taskvm.watch import check_free_space


@pytest.mark.parametrize(
    "limits",
    [
        {"max_duration_s": 0},
        {"max_duration_s": math.nan},
        {"idle_timeout_s": -1},
        {"idle_pause_s": -0.1},
        {"disk_limit_mib": 0},
        {"disk_size_mib": 0},
        {"disk_size_mib": 2**22},
        {"free_disk_mib": -1},
        {"cpu_share": 0},
    ],
)
def test_a_limit_that_cannot_be_held_is_refused_by_name(limits: LimitArguments) -> None:
    with pytest.raises(UsageError, match=next(iter(limits))):
        Limits(**limits)


def test_every_limit_is_a_keyword_of_create() -> None:
    """Sandbox.create takes LimitArguments and makes Limits of them."""
    assert LimitArguments.__annotations__.keys() == {
        *Limits.__dataclass_fields__,
    }


def test_too_little_free_space_is_an_error_with_both_numbers(tmp_path: Path) -> None:
    check_free_space(tmp_path, 0)

    with pytest.raises(HostError, match=r"\d+ MiB are free, and free_disk_mib=1000000000"):
        check_free_space(tmp_path, 10**9)
