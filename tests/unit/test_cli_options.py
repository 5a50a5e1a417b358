"""taskvm.cli.options: the options of a sandbox as texts, here and in the supervisor."""

from pathlib import Path

import click
import pytest

from taskvm import UsageError
from taskvm.cli.options import SANDBOX_OPTIONS, SandboxArguments


def _parameters() -> list[click.Parameter]:
    def nothing() -> None:
        """Has the options."""

    for option in SANDBOX_OPTIONS:
        option(nothing)
    return list(nothing.__click_params__)  # type: ignore[attr-defined]  # what click.option adds


def test_options_survive_the_way_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not named has its default."""
    monkeypatch.chdir(tmp_path)
    arguments = SandboxArguments.of({"memory": 256, "mounts": [".:/workspace:ro"], "env": ["A=b"]})

    there = SandboxArguments.of(arguments.portable())

    assert (there.memory, there.cpus, there.env) == (256, 2, ("A=b",))
    assert there.mounts == (f"{tmp_path}:/workspace:ro",)


@pytest.mark.parametrize(
    "name",
    [each.name for each in _parameters() if each.metavar in ("FILE", "PEM")],
)
def test_every_file_is_named_absolutely(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor has another working directory."""
    monkeypatch.chdir(tmp_path)
    (parameter,) = (each for each in _parameters() if each.name == name)
    given = ("x",) if isinstance(parameter, click.Option) and parameter.multiple else "x"

    portable = SandboxArguments.of({name: given}).portable()[name]

    assert portable == ((f"{tmp_path}/x",) if isinstance(given, tuple) else f"{tmp_path}/x")


@pytest.mark.parametrize("options", [{"nosuch": 1}, {"memory": "much"}, {"mounts": "one"}])
def test_options_that_do_not_exist_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="read the options"):
        SandboxArguments.of(options)


def test_values_of_secrets_travel_beside_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the environment, files and commands; the options name them only."""
    monkeypatch.setenv("TOKEN", "canary-1")
    (tmp_path / "file").write_text("canary-2")
    arguments = SandboxArguments.of(
        {
            "secrets": ["TOKEN@a.example"],
            "secret_files": [f"KEY={tmp_path / 'file'}@a.example"],
            "secret_commands": ["PRINTED=echo canary-3@a.example"],
            "allow": ["a.example"],
        }
    )

    assert arguments.variables() == {"TOKEN": "canary-1", "KEY": "canary-2", "PRINTED": "canary-3"}
    assert "canary-1" not in str(arguments.portable())
    assert "canary-2" not in str(arguments.portable())


def test_every_option_is_an_argument() -> None:
    names = {each.name for each in _parameters()}

    assert names == set(SandboxArguments.__dataclass_fields__)
