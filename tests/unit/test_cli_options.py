"""taskvm.cli.options, taskvm.cli.commandlimits: the options of a sandbox as texts, here and in the supervisor."""

from pathlib import Path

import click
import pytest

from taskvm import ExecLimits, HostDir, UsageError
from taskvm.cli.options import SANDBOX_OPTIONS, SandboxArguments, read_variables
from taskvm.limits import LimitArguments


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

    assert (there.memory, there.cpus, there.env) == (256, None, ("A=b",))
    assert there.mounts == (f"{tmp_path}:/workspace:ro",)


def test_an_empty_path_is_not_the_working_directory() -> None:
    """As of a variable that is not set: the guest would write to another folder than was meant."""
    for mount in (lambda: HostDir(""), SandboxArguments.of({"mounts": [":/workspace"]}).create):
        with pytest.raises(UsageError, match="the path is empty"):
            mount()


def test_two_mounts_at_one_place_are_refused(tmp_path: Path) -> None:
    """One of them would not be there, and nothing would say which."""
    arguments = SandboxArguments.of({"mounts": [f"{tmp_path}:/w", f"{tmp_path}:/w:ro"]})

    with pytest.raises(UsageError, match="another one is at /w"):
        arguments.create()


def test_two_lists_of_addresses_of_one_host_are_refused() -> None:
    """The first was looked at by nobody. One may have them all; two spellings of a name are one."""
    twice = SandboxArguments.of({"resolve": ["a.test=192.0.2.7", "a.test=192.0.2.8"]})
    spelled = SandboxArguments.of({"resolve": ["a.test=192.0.2.7", "A.test.=192.0.2.8"]})

    with pytest.raises(UsageError, match=r"in one: a\.test=192\.0\.2\.7,192\.0\.2\.8"):
        twice.create()
    with pytest.raises(UsageError, match=r"another one is for a\.test"):
        spelled.create()
    SandboxArguments.of({"resolve": ["a.test=192.0.2.7,192.0.2.8", "b.test=::1"]}).create()


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


@pytest.mark.parametrize(
    "options",
    [
        {"limit_memory": 0},
        {"limit_processes": -1},
        {"limit_cpus": float("nan")},
        {"limit_disk_read": 0.0},
        {"limit_disk_write": -1.0},
        {"cpu_weight": 20_000},
        {"disk_limit": 0},
        {"free_disk": -1},
        {"idle_pause": -1.0},
    ],
    ids=str,
)
def test_an_impossible_limit_is_refused_before_anything_starts(options: dict[str, object]) -> None:
    """Also when the supervisor will hold the sandbox."""
    with pytest.raises(UsageError):
        SandboxArguments.of(options).create()


def test_what_is_said_of_limits_reaches_the_sandbox_and_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is not said keeps the engine's default."""
    given: dict[str, object] = {}
    monkeypatch.setattr("taskvm.Sandbox.create", lambda **options: given.update(options))

    arguments = SandboxArguments.of(
        {
            "disk_limit": 100,
            "free_disk": 0,
            "idle_pause": 0.0,
            "limit_memory": 64,
            "limit_disk_read": 1.5,
        }
    )
    arguments.create()

    assert arguments.limits == ExecLimits(memory_mib=64, disk_read_mib_s=1.5)
    assert SandboxArguments.of({}).limits is None
    assert {name: given[name] for name in LimitArguments.__annotations__ if name in given} == {
        "disk_limit_mib": 100,
        "free_disk_mib": 0,
        "idle_pause_s": 0.0,
    }


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


@pytest.mark.parametrize("text", ["99999", "0", "8000:", "a:80", "1:2:3"])
def test_a_port_that_is_none_is_refused_before_anything_starts(text: str) -> None:
    with pytest.raises(UsageError, match="--publish"):
        SandboxArguments.of({"publish": [text]}).check()


def test_no_variable_of_the_host_is_passed_on_by_its_name_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("API_TOKEN", "CANARY")

    with pytest.raises(UsageError, match="--secret API_TOKEN@HOST") as caught:
        read_variables(["A=b", "API_TOKEN"])

    assert "CANARY" not in str(caught.value)
    assert read_variables(["A=b=c", "B="]) == {"A": "b=c", "B": ""}
