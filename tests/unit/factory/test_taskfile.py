"""taskfactory.taskfile: reading and rewriting task files without losing anything."""

import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskfactory import taskfile
from taskfactory.errors import ConfigError
from taskfactory.task import Task, Transition, parse_phase, render_prompt

YAML = """\
# a person's remark
id: MYAP-42
title: Implement OAuth flow   # keep me
phase: ready
created: 2026-02-22T20:15:03.412Z
order: -3
acceptanceCriteria:
  - Login with Google works
  - "Tokens are refreshed: yes"
executionModelConfig: &a1
  provider: anthropic
  modelId: claude-sonnet-4-5
modelConfig: *a1
mystery: {a: no, b: 012}
sandbox:
  enabled: true
  allowedHosts: [accounts.google.com]
description: |
  Add Google sign-in.
history:
  - {from: backlog, to: ready, timestamp: 2026-02-22T20:30:00.000Z, actor: user}
"""
MARKDOWN = """\
---
id: TASK-042
title: "Implement OAuth flow"
sandbox:
  enabled: true
  secrets:
    GITHUB_TOKEN:
      hosts: ["api.github.com"]
---

# What to do

Use PKCE.
---
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> taskfile.TaskFile:
    path = tmp_path / "task.yaml"
    path.write_text(YAML)
    return taskfile.load(path)


def test_a_task_factorys_file_is_read(yaml_file: taskfile.TaskFile) -> None:
    task = yaml_file.task

    assert (task.id, task.phase, task.order) == ("MYAP-42", "ready", -3)
    assert task.created == "2026-02-22T20:15:03.412Z"
    assert task.acceptance_criteria[1] == "Tokens are refreshed: yes"
    assert task.execution_model_config == task.legacy_model_config
    assert task.history == (
        Transition(from_phase="backlog", to_phase="ready", timestamp="2026-02-22T20:30:00.000Z"),
    )


def test_saving_without_a_change_changes_no_byte(yaml_file: taskfile.TaskFile) -> None:
    taskfile.save(yaml_file, yaml_file.task)

    assert yaml_file.path.read_text() == YAML


def test_a_change_touches_its_own_line_only(yaml_file: taskfile.TaskFile) -> None:
    changed = msgspec.structs.replace(
        yaml_file.task, phase="executing", started="2026-02-22T20:40:00.000Z"
    )

    again = taskfile.save(yaml_file, changed)

    text = yaml_file.path.read_text()
    assert (
        text
        == YAML.replace("phase: ready", "phase: executing") + "started: 2026-02-22T20:40:00.000Z\n"
    )
    assert again.task == changed


def test_a_value_that_is_taken_away_leaves_the_file(yaml_file: taskfile.TaskFile) -> None:
    changed = msgspec.structs.replace(yaml_file.task, legacy_model_config=None, order=0)

    text = taskfile.save(yaml_file, changed).path.read_text()

    assert "modelConfig: *a1" not in text
    assert "order" not in text


def test_markdown_with_frontmatter_keeps_its_body(tmp_path: Path) -> None:
    path = tmp_path / "task-042.md"
    path.write_text(MARKDOWN)
    file = taskfile.load(path)
    assert file.task.description == "# What to do\n\nUse PKCE.\n---\n"

    taskfile.save(file, msgspec.structs.replace(file.task, title="Other"))

    assert path.read_text() == MARKDOWN.replace("Implement OAuth flow", "Other")


def test_line_numbers_of_frontmatter_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "task.md"
    path.write_text(MARKDOWN)

    source = taskfile.load(path).sandbox_source()

    assert source is not None
    assert source.where(("sandbox", "secrets", "GITHUB_TOKEN", "hosts", 0)) == f"{path}:8"


@pytest.mark.parametrize("name", ["task.yaml", "task.md"])
def test_a_created_task_reads_back_the_same(tmp_path: Path, name: str) -> None:
    task = Task(
        id="A-1", title="t: #x", description="one\ntwo\n", created="2026-02-22T20:15:03.412Z"
    )

    assert taskfile.create(tmp_path / name, task).task == task
    with pytest.raises(FileExistsError):
        taskfile.create(tmp_path / name, task)


def test_the_old_name_of_a_phase_is_understood() -> None:
    assert parse_phase("planning") == "backlog"
    assert parse_phase("done") is None


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("title: no id\n", "f.yaml:1"),
        ("id: A-1\nphase: done\n", "f.yaml:2: phase"),
        ("id: A-1\norder: high\n", "f.yaml:2: order"),
        ("id: A-1\nsandbox: true\n", "f.yaml:2: sandbox"),
        ("id: A-1\nhistory:\n  - {actor: robot}\n", "f.yaml:2: history"),
        ("- a\n", "f.yaml:1"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=where):
        taskfile.load(path)


@pytest.mark.parametrize("text", ["", "no fence\n", "---\nid: A\n"])
def test_markdown_without_frontmatter_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "task.md"
    path.write_text(text)

    with pytest.raises(ConfigError, match="between two lines"):
        taskfile.load(path)


def test_a_replaced_file_keeps_its_mode_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o750)

    taskfile.replace_file(path, b"new")

    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o750
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_the_prompt_has_all_that_the_agent_must_know() -> None:
    task = Task(
        id="A-1",
        title="Fix it",
        description="Words.",
        acceptance_criteria=("It works",),
        testing_instructions=("make test",),
    )

    assert render_prompt(task) == (
        "# A-1: Fix it\n\nWords.\n\n## Acceptance criteria\n- It works\n\n## How to test\n- make test\n"
    )


HARD = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30) | st.lists(
    st.sampled_from(
        ["\n", " ", "a", "#", ": ", "- ", "\t", "---", "'", '"', "|", "\r", "  x", "\u2028", "\x85"]
    )
).map("".join)


@given(HARD, HARD)
@settings(deadline=None)
def test_any_text_survives_a_rewrite(one: str, other: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "task.yaml"
        path.write_text(
            'id: A-1\ntitle: "x"\ndescription: |\n  some\n\n  more\nprUrl: >\n  f\n  g\n'
        )
        file = taskfile.load(path)
        task = msgspec.structs.replace(
            file.task, title=one, description=other, pr_url=one, acceptance_criteria=(one, other)
        )

        assert taskfile.save(file, task).task == task
