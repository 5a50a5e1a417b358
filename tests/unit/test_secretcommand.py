"""A program as a secret's source (taskvm.secretcommand): nothing that it says is repeated."""

from __future__ import annotations

import sys

import pytest

from taskvm.egress.secret import MAX_VALUE, Secret
from taskvm.errors import UsageError
from taskvm.secretcommand import command_output


def test_the_output_is_the_value() -> None:
    secret = Secret.from_callback("T", command_output(["echo", "tok-1"]), hosts=["api.test"])

    assert secret.reveal() == "tok-1"
    assert secret.renewed().reveal() == "tok-1"
    assert "tok-1" not in repr(secret)


@pytest.mark.parametrize(
    "code",
    [
        "print('canary'); raise SystemExit(3)",
        "print('canary', flush=True); import time; time.sleep(60)",
        f"print('canary' * {MAX_VALUE})",
        "import os; os.write(1, b'canary\\xff')",
        "print('canary\\n\\nmore')",
    ],
)
def test_a_failure_says_nothing_of_the_output(code: str) -> None:
    run = command_output([sys.executable, "-c", code.replace("canary", "can" + "ary")], timeout_s=2)

    with pytest.raises(UsageError) as caught:
        Secret.from_callback("T", run, hosts=["api.test"])

    assert caught.value.__cause__ is None
    assert "canarycanary" not in str(caught.value)
    assert "canary\n" not in str(caught.value.cause)


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(UsageError, match="nosuchprogram"):
        command_output(["/nosuchprogram"])()


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_time_to_refresh_is_more_than_nothing(seconds: float) -> None:
    with pytest.raises(UsageError, match="refresh_s"):
        Secret.from_callback("T", lambda: "x", hosts=["api.test"], refresh_s=seconds)
