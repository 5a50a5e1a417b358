"""taskvm.arguments: a wrong argument is told, and never dropped, whether or not its caller has a type checker."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taskvm import Secret, UsageError
from taskvm.arguments import (
    MAX_ARGUMENT_BYTES,
    check_stdin,
    check_timeout,
    check_variables,
    read_command,
    refuse_unknown,
    tell_command,
)
from taskvm.opening import Opening
from taskvm.options import Machinery, SandboxOptions, change_options, read_options

SHELL = "/bin/bash"


def _options() -> SandboxOptions:
    return read_options(Machinery())


@pytest.mark.parametrize(
    "call",
    [
        lambda: read_options(Machinery(), max_duration=3600),  # type: ignore[call-arg]  # the mistake
        lambda: change_options(_options(), max_duration=3600),  # type: ignore[call-arg]  # the same, at a fork
        lambda: Secret.from_value("KEY", "canary-3310", hosts=["a.example"], header=["X-Key"]),  # type: ignore[call-arg]  # headers
    ],
    ids=["create", "fork", "secret"],
)
def test_an_argument_that_does_not_exist_is_refused(call: Callable[[], object]) -> None:
    """A limit or a restriction that was mistyped would silently not hold."""
    with pytest.raises(UsageError, match=r"Did you mean (max_duration_s|headers)\?") as caught:
        call()
    assert "canary-3310" not in str(caught.value)


def test_a_name_like_none_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match="There are one, two"):
        refuse_unknown("do it", ["xyz"], ["two", "one"])


@pytest.mark.parametrize(
    "machinery", [Machinery(accel="hvf"), Machinery(accel=None)]  # type: ignore[arg-type]  # mistakes
)  # fmt: skip
def test_an_accelerator_that_does_not_exist_is_refused(machinery: Machinery) -> None:
    with pytest.raises(UsageError, match='"auto", "kvm" or "tcg"'):
        read_options(machinery)


def test_a_path_in_the_place_of_a_provider_is_told() -> None:
    """The first thing that everybody writes once."""
    with pytest.raises(UsageError, match=r"Write HostDir\('/src'\)"):
        read_options(Machinery(), mounts={"/workspace": "/src"})  # type: ignore[dict-item]  # the mistake


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"policy": "github.toml"}, "Policy.from_file"),
        ({"oversight": print}, r"Oversight\(approver\)"),
        ({"secrets": ["canary-77f0"]}, "Secret.from_env"),
        ({"extra_ca_files": "/etc/ca.pem"}, r"Write a list: \['/etc/ca.pem'\]"),
    ],
)
def test_an_argument_of_another_type_is_refused(given: dict[str, Any], advice: str) -> None:
    """Some would be noticed when a guest runs already, and some never."""
    with pytest.raises(UsageError, match=advice) as caught:
        read_options(Machinery(), **given)
    assert "canary-77f0" not in str(caught.value)


@pytest.mark.parametrize(
    ("stdin", "iterable"),
    [
        ([b"a"], "__aiter__"),
        (io.BytesIO(b"a"), "__aiter__"),
        (bytearray(b"a"), "__iter__"),
        (3, "__iter__"),
    ],
)
def test_what_cannot_be_fed_to_a_command_is_refused(stdin: object, iterable: str) -> None:
    """Before the command has started. A bytearray would be fed as numbers."""
    with pytest.raises(UsageError, match="its stdin is a text, bytes, or an"):
        check_stdin(stdin, iterable)


def test_an_argument_is_a_text() -> None:
    """Bytes would arrive as "b'…'". Paths and numbers have a text that is meant."""
    for wrong in (b"x", None, ["x"]):
        with pytest.raises(UsageError, match="is of the type"):
            read_command(["echo", wrong], SHELL)  # type: ignore[list-item]  # the mistake

    assert read_command(["head", "-c", 5, Path("/f")], SHELL) == ["head", "-c", "5", "/f"]  # type: ignore[list-item]


@pytest.mark.parametrize("variables", [{"A=B": "x"}, {"A": 1}, {1: "x"}, {"A": "\0"}])
def test_a_variable_that_no_environment_can_hold_is_refused(variables: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="set the variable"):
        check_variables(variables)


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan])
def test_a_time_that_is_over_before_it_begins_is_refused(timeout_s: float) -> None:
    with pytest.raises(UsageError, match="positive"):
        check_timeout(timeout_s)


@pytest.mark.parametrize(
    "command", [None, 3, b"ls", [], [""], ["a\0"], "a\0", ["x" * (MAX_ARGUMENT_BYTES + 1)]]
)
def test_what_is_no_command_is_refused(command: list[str]) -> None:
    with pytest.raises(UsageError, match="in the guest"):
        read_command(command, SHELL)


def test_a_text_is_for_the_shell_and_a_list_is_not() -> None:
    """Numbers in a list are what they look like."""
    assert read_command("ls *", SHELL) == [SHELL, "-c", "ls *"]
    assert read_command(["sleep", 5], SHELL) == ["sleep", "5"]  # type: ignore[list-item]  # often forgotten
    assert tell_command(["echo", "a b", 5]) == "echo 'a b' 5"  # type: ignore[list-item]  # the same


def test_a_forgotten_await_is_told() -> None:
    """The next line of who forgets it asks the result for `exec` or `files`."""

    async def begin() -> None:
        raise AssertionError("it was not asked for")

    opening = Opening(begin)  # type: ignore[type-var,arg-type]  # nothing is opened

    with pytest.raises(AttributeError, match=r"exec: this has not begun yet; await it"):
        opening.exec  # noqa: B018  # type: ignore[attr-defined]  # the mistake
