"""A task of a Task Factory, as a value: what its file says, and nothing that was not in it.

Keys are those of the file (camelCase there). A struct ignores keys it does not know: other programs
keep their own in the same file, and `taskfile` carries them through every rewrite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

Phase = Literal["backlog", "ready", "executing", "complete", "archived"]
PHASES: tuple[Phase, ...] = ("backlog", "ready", "executing", "complete", "archived")
Actor = Literal["user", "agent", "system"]
ThinkingLevel = Literal["off", "minimal", "low", "medium", "high", "xhigh"]

# Parts that this package carries and does not read: a visual plan's sections, a sandbox's raw words.
Opaque = dict[str, Any]


class _Value(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Base of everything in a task file: immutable, camelCase in the file, optional keys left out."""


class ModelConfig(_Value, frozen=True):
    """Which model works, and how hard it thinks."""

    provider: str
    model_id: str
    thinking_level: ThinkingLevel | None = None


class Plan(_Value, frozen=True):
    """What the planning agent proposed."""

    goal: str = ""
    steps: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    cleanup: tuple[str, ...] = ()
    visual_plan: Opaque | None = None
    generated_at: str | None = None


class Attachment(_Value, frozen=True):
    """A file that belongs to a task; `stored_name` is its name in the task's attachments directory."""

    id: str
    filename: str
    stored_name: str
    mime_type: str = "application/octet-stream"
    size: int = 0
    created_at: str = ""


class Blocked(_Value, frozen=True):
    """Whether the task waits for something outside it."""

    is_blocked: bool = False
    reason: str | None = None
    since: str | None = None


class Transition(_Value, frozen=True):
    """One move between phases."""

    from_phase: str = msgspec.field(name="from", default="")
    to_phase: str = msgspec.field(name="to", default="")
    timestamp: str = ""
    actor: Actor = "user"
    reason: str | None = None


class Task(_Value, frozen=True):
    """One task. Times are ISO 8601 in UTC, as text; durations are seconds.

    `order` is lower the further left the card lies; the queue takes the highest first. `sandbox` is
    what the task asks for, unchecked: `sandboxconfig.merge_sandbox` decides what it gets.
    """

    id: str
    title: str = ""
    phase: Phase = "backlog"
    created: str = ""
    updated: str = ""
    started: str | None = None
    completed: str | None = None
    assigned: str | None = None
    workspace: str = ""
    project: str = ""
    cycle_time: int | None = None
    lead_time: int | None = None
    blocked_count: int = 0
    blocked_duration: int = 0
    blocked: Blocked | None = None
    order: int = 0
    acceptance_criteria: tuple[str, ...] = ()
    testing_instructions: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()
    branch: str | None = None
    pr_url: str | None = None
    pre_planning_skills: tuple[str, ...] = ()
    pre_execution_skills: tuple[str, ...] = ()
    post_execution_skills: tuple[str, ...] = ()
    skill_configs: dict[str, dict[str, str]] | None = None
    planning_model_config: ModelConfig | None = None
    execution_model_config: ModelConfig | None = None
    # What `executionModelConfig` was called before; files have both, with the same content.
    legacy_model_config: ModelConfig | None = msgspec.field(name="modelConfig", default=None)
    planning_fallback_models: tuple[ModelConfig, ...] = ()
    execution_fallback_models: tuple[ModelConfig, ...] = ()
    usage_metrics: Opaque | None = None
    plan: Plan | None = None
    planning_status: Literal["running", "completed", "error"] | None = None
    planning_skipped: bool | None = None
    attachments: tuple[Attachment, ...] = ()
    session_file: str | None = None
    post_execution_summary: Opaque | None = None
    sandbox: Opaque | None = None
    description: str = ""
    history: tuple[Transition, ...] = ()


def parse_phase(text: object) -> Phase | None:
    """Return the phase a file names, or None. `planning` is what `backlog` was called in old files."""
    if text == "planning":
        return "backlog"
    return next((phase for phase in PHASES if phase == text), None)


def render_prompt(task: Task, attached: Sequence[str] = ()) -> str:
    """Return what the agent is asked to do: title, description, acceptance criteria, how to test, attachments.

    `attached` has a line for each attachment, with its path where the tools act.
    """
    parts = [f"# {task.id}: {task.title}".rstrip(": "), task.description.strip()]
    for heading, items in (
        ("Acceptance criteria", task.acceptance_criteria),
        ("How to test", task.testing_instructions),
        ("Attachments", attached),
    ):
        if items:
            parts.append("\n".join([f"## {heading}", *(f"- {item}" for item in items)]))
    return "\n\n".join(part for part in parts if part) + "\n"
