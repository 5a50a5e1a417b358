"""taskfactory.sandboxconfig: what a task gets of what its workspace allows."""

from pathlib import Path

import pytest

from taskfactory.document import parse_document
from taskfactory.errors import ConfigError
from taskfactory.sandboxconfig import HostPattern, SandboxConfig, SandboxSecret, merge_sandbox

WORKSPACE = """\
{
  "enabled": true,
  "allowedHosts": ["api.github.com", "*.example.org"],
  "secrets": {
    "GITHUB_TOKEN": {"hosts": ["api.github.com"], "envVar": "GH"},
    "NPM_TOKEN": {"hosts": ["packages.example.org", "cdn.example.org"]}
  },
  "imagePath": null,
  "checkpointPath": null,
  "taskMayAllow": ["*.google.com"]
}
"""


def merge(
    workspace: str | None = None, task: str | None = None, *, env_default: bool = False
) -> SandboxConfig:
    return merge_sandbox(
        workspace=None if workspace is None else parse_document(workspace, "sandbox.json").source(),
        task=None if task is None else parse_document(task, "task.yaml").source(),
        env_default=env_default,
    )


def problems(
    workspace: str | None, task: str | None = None, *, env_default: bool = False
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        merge(workspace, task, env_default=env_default)
    return [str(problem) for problem in caught.value.problems]


def test_without_any_file_there_is_no_sandbox_and_nothing_is_allowed() -> None:
    assert merge() == SandboxConfig()


def test_the_documents_own_example_is_read() -> None:
    config = merge(WORKSPACE)

    assert config.enabled
    assert config.allowed_hosts == ("api.github.com", "*.example.org")
    assert config.secrets["GITHUB_TOKEN"] == SandboxSecret(hosts=("api.github.com",), env_var="GH")
    assert config.secrets["NPM_TOKEN"].env_var == "NPM_TOKEN"
    assert config.image_path is None
    assert config.on_unavailable == "refuse"


@pytest.mark.parametrize(
    ("workspace", "task", "default", "enabled"),
    [
        (None, None, True, True),
        ("{}", None, True, True),
        ("enabled: false", None, True, False),
        ("enabled: true", None, False, True),
        ("enabled: false", "enabled: true", False, True),
        (None, "enabled: true", False, True),
        (None, "enabled: false", False, False),
    ],
)
def test_the_switch(workspace: str | None, task: str | None, default: bool, enabled: bool) -> None:
    assert merge(workspace, task, env_default=default).enabled is enabled


@pytest.mark.parametrize(
    ("workspace", "default"), [("enabled: true", False), ("{}", True), (None, True)]
)
def test_a_task_cannot_switch_off_a_demanded_sandbox(workspace: str | None, default: bool) -> None:
    assert problems(workspace, "enabled: false", env_default=default) == [
        "task.yaml:1: enabled: a task cannot switch off the sandbox its workspace demands"
    ]


def test_a_tasks_hosts_extend_within_the_workspaces_ceiling() -> None:
    config = merge(WORKSPACE, "allowedHosts: [accounts.google.com, api.github.com, a.example.org]")

    assert config.allowed_hosts == (
        "api.github.com",
        "*.example.org",
        "accounts.google.com",
        "a.example.org",
    )


@pytest.mark.parametrize(
    "host", ["evil.test", "google.com", "*.com", "*.google.com.evil.test", "notgoogle.com"]
)
def test_a_host_beyond_the_ceiling_is_refused(host: str) -> None:
    assert "task.yaml:1: allowedHosts[0]" in problems(WORKSPACE, f"allowedHosts: ['{host}']")[0]


def test_without_a_workspace_file_a_task_may_allow_nothing() -> None:
    assert len(problems(None, "{enabled: true, allowedHosts: [api.github.com]}")) == 1


def test_a_missing_or_empty_list_allows_nothing() -> None:
    assert merge("enabled: true").allowed_hosts == ()
    assert merge("{enabled: true, allowedHosts: []}").allowed_hosts == ()


def test_a_task_narrows_one_secret_and_keeps_the_others() -> None:
    config = merge(WORKSPACE, "secrets: {NPM_TOKEN: {hosts: [cdn.example.org]}}")

    assert config.secrets["NPM_TOKEN"].hosts == ("cdn.example.org",)
    assert config.secrets["GITHUB_TOKEN"].hosts == ("api.github.com",)


def test_a_workspace_says_where_a_secret_stands_and_what_it_looks_like() -> None:
    """A task that narrows its hosts changes nothing of that."""
    wide = """{allowedHosts: [a.test, b.test], secrets: {T: {hosts: [a.test, b.test], headers: [X-T],
        places: [body, query], shape: "ghp_*{36}"}}}"""

    secret = merge(wide, "secrets: {T: {hosts: [a.test]}}").secrets["T"]

    assert (secret.hosts, secret.headers) == (("a.test",), ("X-T",))
    assert (secret.places, secret.shape) == (("query", "body"), "ghp_*{36}")


def test_a_place_that_does_not_exist_is_told() -> None:
    text = "{allowedHosts: [a.test], secrets: {T: {hosts: [a.test], places: [body, header]}}}"

    where, key, cause = problems(text)[0].split(": ", 2)

    assert (where, key) == ("sandbox.json:1", "secrets.T.places[1]")
    assert cause == "'header' is none of query, path, body"


def test_a_task_uses_a_secret_as_it_is_declared() -> None:
    assert merge(WORKSPACE, "secrets: {GITHUB_TOKEN: }").secrets == merge(WORKSPACE).secrets


def test_a_task_gives_up_a_secret_with_an_empty_list() -> None:
    assert set(merge(WORKSPACE, "secrets: {NPM_TOKEN: {hosts: []}}").secrets) == {"GITHUB_TOKEN"}


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("secrets: {AWS_KEY: {hosts: [api.github.com]}}", "secrets.AWS_KEY"),
        ("secrets: {GITHUB_TOKEN: {hosts: [cdn.example.org]}}", "secrets.GITHUB_TOKEN.hosts[0]"),
        ("secrets: {GITHUB_TOKEN: {hosts: ['*.github.com']}}", "secrets.GITHUB_TOKEN.hosts[0]"),
        ("secrets: {GITHUB_TOKEN: {envVar: AWS_KEY}}", "secrets.GITHUB_TOKEN.envVar"),
        ("secrets: {GITHUB_TOKEN: {places: [body]}}", "secrets.GITHUB_TOKEN.places"),
        ("secrets: {GITHUB_TOKEN: {headers: [X-Any]}}", "secrets.GITHUB_TOKEN.headers"),
    ],
)
def test_a_task_cannot_widen_a_secret(task: str, key: str) -> None:
    assert [problem.split(": ")[1] for problem in problems(WORKSPACE, task)] == [key]


@pytest.mark.parametrize(
    "key",
    [
        "taskMayAllow",
        "onUnavailable",
        "allowedAddresses",
        "resolve",
        "extraCaFiles",
        "hiddenFiles",
        "privateFiles",
        "passthrough",
        "workspaceMode",
    ],
)
def test_some_words_are_the_workspaces_alone(key: str) -> None:
    assert problems(WORKSPACE, f"{key}: x") == [
        f"task.yaml:1: {key}: only the workspace's sandbox.json may say this"
    ]


def test_a_workspace_for_review_is_never_worked_on_by_the_host() -> None:
    """It needs a sandbox, whoever switches it on, and the host does not take its place."""
    review = "workspaceMode: review"

    assert merge(f"{{enabled: true, {review}}}").workspace_mode == "review"
    assert merge(f"{{{review}}}", "enabled: true").enabled
    assert merge(f"{{{review}}}", env_default=True).enabled
    assert "set it to true" in problems(f"{{{review}}}")[0]
    assert "drop onUnavailable" in problems(f"{{enabled: true, {review}, onUnavailable: host}}")[0]
    assert "neither" in problems("{enabled: true, workspaceMode: ro}")[0]
    private = "privateFiles: [.venv/]"
    assert "hiddenFiles" in problems(f"{{enabled: true, {review}, {private}}}")[0]
    assert merge(f"{{enabled: true, {private}}}").private_files == (".venv/",)


def test_a_task_names_an_image_of_the_store() -> None:
    config = merge(WORKSPACE, "{imagePath: 'python-dev:3', checkpointPath: base}")

    assert (config.image_path, config.checkpoint_path) == ("python-dev:3", "base")


@pytest.mark.parametrize("path", ["/workspace/evil", "../x", "a/b", "~/x", ".", "", "x\\n"])
def test_a_task_cannot_point_at_an_image_file(path: str) -> None:
    assert "imagePath" in problems(WORKSPACE, f'imagePath: "{path}"')[0]


def test_a_passage_must_be_allowed() -> None:
    text = "{allowedHosts: ['*.a.test'], passthrough: [x.a.test, b.test]}"

    assert merge("{allowedHosts: [a.test], passthrough: [a.test]}", "{}").passthrough == ("a.test",)
    assert [problem.split(": ")[1] for problem in problems(text, "{}")] == ["passthrough[1]"]


def test_a_secrets_hosts_must_be_allowed() -> None:
    text = "{allowedHosts: [a.test], secrets: {T: {hosts: [a.test, b.test]}}}"

    where, key, cause = problems(text)[0].split(": ", 2)

    assert (where, key) == ("sandbox.json:1", "secrets.T.hosts[1]")
    assert cause == "a secret's hosts must be allowed hosts: add b.test to allowedHosts"


def test_every_problem_of_both_files_is_reported_with_its_line() -> None:
    workspace = """\
{
  "enabled": "yes",
  "allowedHosts": ["https://api.github.com/", 7],
  "surprise": 1,
  "secrets": {"A B": {"hosts": "x"}, "T": {}},
  "onUnavailable": "shrug"
}"""

    found = problems(workspace, "allowedHosts:\n  - fine.test\n  - also.test\n")

    assert {problem.split(": ")[0] + " " + problem.split(": ")[1] for problem in found} == {
        "sandbox.json:2 enabled",
        "sandbox.json:3 allowedHosts[0]",
        "sandbox.json:3 allowedHosts[1]",
        "sandbox.json:4 surprise",
        "sandbox.json:5 secrets.A B",
        "sandbox.json:5 secrets.A B.envVar",
        "sandbox.json:5 secrets.A B.hosts",
        "sandbox.json:5 secrets.T.hosts",
        "sandbox.json:6 onUnavailable",
        "task.yaml:2 allowedHosts[0]",
        "task.yaml:3 allowedHosts[1]",
    }


@pytest.mark.parametrize(
    ("pattern", "host", "covered"),
    [
        ("a.test", "A.TEST.", True),
        ("a.test", "b.a.test", False),
        ("*.a.test", "b.a.test", True),
        ("*.a.test", "a.test", False),
        ("*.a.test", "*.b.a.test", True),
        ("*.b.a.test", "*.a.test", False),
        ("a.test", "*.a.test", False),
        ("a.test", "a.test:443", True),
        ("a.test:443", "a.test", False),
        ("a.test:443", "a.test:444", False),
        ("*.a.test", "xa.test", False),
    ],
)
def test_a_pattern_covers_what_lies_wholly_in_it(pattern: str, host: str, covered: bool) -> None:
    assert HostPattern.parse(pattern).covers(HostPattern.parse(host)) is covered


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "*.",
        "*.com",
        "a.*.test",
        "http://a",
        "a/b",
        "a:0",
        "a:99999",
        "a:x",
        "a b",
        "-a.test",
        "a..b",
    ],
)
def test_what_is_no_host_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write|port|wildcard"):
        HostPattern.parse(text)


def test_a_files_own_path_is_in_its_problems(tmp_path: Path) -> None:
    from taskfactory.document import read_document

    path = tmp_path / "sandbox.json"
    path.write_text('{\n\t"enabled": 1\n}')

    with pytest.raises(ConfigError, match=rf"{path}:2: enabled: "):
        merge_sandbox(workspace=read_document(path).source(), task=None, env_default=False)


# What to start from...


@pytest.mark.parametrize("key", ["imagePath", "checkpointPath"])
def test_a_task_that_chooses_what_to_start_from_never_gets_the_host(key: str) -> None:
    """What it names may not be there, or be of a processor whose QEMU is missing."""
    workspace = '{"enabled": true, "onUnavailable": "host"}'

    assert merge(workspace).on_unavailable == "host"
    assert merge(workspace, f"{key}: mine").on_unavailable == "refuse"


def test_a_tasks_image_beside_its_workspaces_checkpoint_is_a_conflict() -> None:
    """The checkpoint has its own: the task's would be ignored in silence."""
    workspace = '{"enabled": true, "checkpointPath": "dev-base"}'

    [problem] = problems(workspace, "imagePath: py")
    assert problem.startswith("task.yaml:1: imagePath: the workspace starts from the checkpoint")
    assert merge('{"imagePath": "py"}', "checkpointPath: dev-base").checkpoint_path == "dev-base"


@pytest.mark.parametrize("path", ["saved/base.qcow2", "./base.qcow2", "~/base.qcow2", "dev base"])
def test_a_workspaces_checkpoint_is_a_name_or_a_path_that_depends_on_nothing(path: str) -> None:
    """What a relative path means would depend on where taskfactory was started."""
    [problem] = problems(f'{{"checkpointPath": "{path}"}}')

    assert problem.startswith("sandbox.json:1: checkpointPath: ")
    assert merge('{"checkpointPath": "/var/base.qcow2"}').checkpoint_path == "/var/base.qcow2"
    assert merge('{"checkpointPath": "dev-base"}').checkpoint_path == "dev-base"


def test_a_workspaces_image_is_a_name_of_the_store() -> None:
    assert "sandbox.json:1: imagePath: " in problems('{"imagePath": "/var/images/mine"}')[0]
