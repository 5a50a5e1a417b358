"""taskvm.image.tools: the host's programs, and what is said when they are missing or fail."""

import pytest

from taskvm.errors import ImageError
from taskvm.image.tools import require_tool, run_tool


def test_a_missing_program_is_an_error_with_the_command_that_installs_it() -> None:
    with pytest.raises(ImageError, match="apt-get install --no-install-recommends mmdebstrap"):
        require_tool("no-such-program", "mmdebstrap")


def test_programs_of_the_administrator_are_found_without_their_directory_in_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    assert require_tool("mke2fs", "e2fsprogs").endswith("sbin/mke2fs")


def test_a_failure_says_the_operation_the_program_and_its_complaint() -> None:
    with pytest.raises(ImageError) as failed:
        run_tool("try it", ["sh", "-c", "echo out of luck >&2; exit 3"])

    assert str(failed.value) == "try it: sh ended with 3: out of luck"


def test_a_program_that_cannot_be_run_is_an_error_too() -> None:
    with pytest.raises(ImageError, match="cannot be run"):
        run_tool("try it", ["/nonexistent/program"])
