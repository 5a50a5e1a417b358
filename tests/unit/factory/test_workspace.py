"""taskfactory.workspace and taskfactory.settings: which file decides, and where it must not lie."""

import json
from pathlib import Path

import pytest

from taskfactory.errors import ConfigError, UnsafePathError
from taskfactory.settings import read_settings
from taskfactory.workspace import Workspace, open_workspace


@pytest.fixture
def project(tmp_path: Path) -> Path:
    path = tmp_path / "project"
    path.mkdir()
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


def register(home: Path, project: Path, identity: str = "uuid-1") -> Path:
    (home / "workspaces.json").write_text(
        json.dumps([{"id": identity, "path": str(project), "name": "P"}])
    )
    config = home / "workspaces" / "uuid-1" / "sandbox.json"
    config.parent.mkdir(parents=True)
    config.write_text('{"enabled": true}')
    return config


def test_a_registered_workspace_has_its_file(home: Path, project: Path) -> None:
    config = register(home, project)

    workspace = open_workspace(project, home)

    assert workspace == Workspace(path=project, id="uuid-1", name="P", config_path=config)
    source = workspace.sandbox_source()
    assert source is not None
    assert source.data == {"enabled": True}


def test_an_unregistered_directory_has_none(home: Path, project: Path) -> None:
    workspace = open_workspace(project, home)

    assert (workspace.id, workspace.config_path) == (None, None)
    assert workspace.sandbox_source() is None


def test_a_registered_workspace_is_found_through_a_link(home: Path, project: Path) -> None:
    register(home, project)
    link = home.parent / "link"
    link.symlink_to(project)

    workspace = open_workspace(link, home)

    assert (workspace.id, workspace.path) == ("uuid-1", link)


def test_a_named_file_replaces_the_registered_one(home: Path, project: Path) -> None:
    register(home, project)
    other = home / "other.json"
    other.write_text("{}")

    assert open_workspace(project, home, other).config_path == other


@pytest.mark.parametrize(
    "broken", ["workspaces.json", "workspaces", "workspaces/uuid-1/sandbox.json"]
)
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_file_that_cannot_be_found_out_about_is_no_missing_file(
    home: Path, project: Path, broken: str, target: str
) -> None:
    """A link to a disk that is not mounted: what it says may be that a sandbox is demanded."""
    register(home, project)
    path = home / broken
    path.rename(home / "elsewhere")
    path.symlink_to(path if target == "itself" else "/mnt/not-mounted/file")

    with pytest.raises((ConfigError, UnsafePathError), match="cannot be read|links lead to it"):
        open_workspace(project, home).sandbox_source()


def test_a_file_in_the_workspace_is_refused(home: Path, project: Path) -> None:
    inside = project / "sandbox.json"
    inside.write_text("{}")

    with pytest.raises(UnsafePathError, match="an agent could"):
        open_workspace(project, home, inside)


def test_a_link_to_a_file_in_the_workspace_is_refused(home: Path, project: Path) -> None:
    inside = project / "sandbox.json"
    inside.write_text("{}")
    link = home / "sandbox.json"
    link.symlink_to(inside)

    with pytest.raises(UnsafePathError):
        open_workspace(project, home, link)


def test_a_link_in_the_workspace_to_a_file_outside_is_refused(home: Path, project: Path) -> None:
    outside = home / "sandbox.json"
    outside.write_text("{}")
    link = project / "sandbox.json"
    link.symlink_to(outside)

    with pytest.raises(UnsafePathError):
        open_workspace(project, home, link)


def test_a_way_that_only_passes_through_the_workspace_is_refused(home: Path, project: Path) -> None:
    outside = home / "sandbox.json"
    outside.write_text("{}")
    (project / "agents-own-link").symlink_to(home)
    (home / "one").symlink_to(project / "agents-own-link")

    for path in (
        home / "one" / "sandbox.json",
        home / "." / "one" / ".." / "home" / "sandbox.json",
    ):
        with pytest.raises(UnsafePathError):
            open_workspace(project, home, path)


def test_links_elsewhere_are_followed_and_circles_are_not(home: Path, project: Path) -> None:
    (home / "real.json").write_text("{}")
    (home / "link.json").symlink_to("real.json")
    (home / "circle.json").symlink_to("circle.json")

    assert open_workspace(project, home, home / "link.json").config_path == home / "link.json"
    with pytest.raises(UnsafePathError, match="links"):
        open_workspace(project, home, home / "circle.json")


def test_a_file_beside_the_workspace_may_be_named_from_within(home: Path, project: Path) -> None:
    beside = project / ".." / "sandbox.json"
    beside.write_text("{}")

    assert open_workspace(project, home, beside).config_path == beside


def test_a_home_in_the_workspace_is_refused(project: Path) -> None:
    with pytest.raises(UnsafePathError):
        open_workspace(project, project)
    with pytest.raises(UnsafePathError, match="Task Factory home"):
        open_workspace(project, project / ".taskfactory")


@pytest.mark.parametrize(
    "text", ['{"id": 1}', '[{"id": "x"}]', "[7]", "[", '[{"id": "../..", "path": "PROJECT"}]']
)
def test_a_broken_registry_is_refused(home: Path, project: Path, text: str) -> None:
    (home / "workspaces.json").write_text(text.replace("PROJECT", str(project)))

    with pytest.raises(ConfigError, match=r"workspaces\.json:"):
        open_workspace(project, home)


def test_a_file_is_no_workspace(home: Path, project: Path) -> None:
    file = project / "x"
    file.write_text("")

    with pytest.raises(ConfigError, match="not a directory"):
        open_workspace(file, home)


def test_settings_come_from_the_environment() -> None:
    user = Path("/home/me")

    assert read_settings({}, user).home == Path("/home/me/.taskfactory")
    assert read_settings({"TASKFACTORY_HOME": "/x"}, user).home == Path("/x")
    assert read_settings({"PI_FACTORY_SANDBOX": "1"}, user).sandbox_default is True
    assert read_settings({"PI_FACTORY_SANDBOX": "0"}, user).sandbox_default is False
