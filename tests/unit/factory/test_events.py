"""taskfactory.events: events as JSON and as one safe line."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskfactory.events import (
    MAX_LINE,
    AgentText,
    AnyEvent,
    BeforeAgentStart,
    Image,
    SessionShutdown,
    SessionStart,
    Status,
    ToolCall,
    ToolResult,
    ToolUpdate,
    UserBash,
    UserBashResult,
    escape,
    escape_block,
    render_line,
    to_json,
)

EVENTS: list[AnyEvent] = [
    SessionStart(task_id="A-1", sandboxed=True, cwd="/workspace", place="in the sandbox x"),
    BeforeAgentStart(prompt="do", system_prompt="be"),
    AgentText(text="hello"),
    ToolCall(call_id="1", tool="bash", arguments={"command": "ls"}),
    ToolUpdate(call_id="1", text="x"),
    ToolResult(call_id="1", tool="bash", text="out", is_error=True),
    UserBash(command="ls", cwd="/workspace"),
    UserBashResult(command="ls", text="a", exit_code=1),
    Status(text="booting"),
    SessionShutdown(outcome="success"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_survives_json_and_names_itself(event: AnyEvent) -> None:
    data = to_json(event)

    assert msgspec.json.decode(data, type=AnyEvent) == event
    assert b'"event":"' in data


def test_a_lone_surrogate_does_not_stop_the_record() -> None:
    event = ToolCall(call_id="1", tool="ls", arguments={"\udcff": ["a\ud800"]})

    assert b'{"?":["a?"]}' in to_json(event)


@given(st.text(max_size=20))
def test_json_has_nothing_that_could_act_on_a_terminal(text: str) -> None:
    line = to_json(AgentText(text=text)).decode()

    assert line == escape(line)
    assert msgspec.json.decode(line, type=AnyEvent) == AgentText(
        text=text.encode("utf-8", "replace").decode()
    )


def test_deleting_reversing_and_hiding_signs_are_escaped_in_json() -> None:
    assert b'"\\u007f\\u009b2J\\u202e\\udb40\\udc41"' in to_json(
        AgentText(text="\x7f\x9b2J\u202e\U000e0041")
    )


def test_a_pictures_data_is_not_in_json() -> None:
    picture = Image("image/png", b"\x89PNG")
    result = ToolResult(call_id="1", tool="read", text="[image/png]", images=(picture,))

    assert b'"images":[]' in to_json(result)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\e[31mred"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202etxt.exe", "\\u{202e}txt.exe"),
        ("a\u200bb\u2028c", "a\\u{200b}b\\u{2028}c"),
        ("\U000e0041", "\\u{e0041}"),
        ("\ud800", "\\u{d800}"),
        ("grün 文", "grün 文"),
    ],
)
def test_what_acts_on_a_terminal_is_made_visible(text: str, shown: str) -> None:
    assert escape(text) == shown


@given(st.text())
def test_a_line_is_one_line_without_control_bytes(text: str) -> None:
    line = render_line(ToolCall(call_id="1", tool=text, arguments={"command": text}))

    assert len(line) <= MAX_LINE
    assert all(ord(sign) >= 0x20 and not 0x7F <= ord(sign) <= 0x9F for sign in line)
    assert len(line.splitlines()) <= 1


def test_a_block_keeps_its_lines_and_nothing_else() -> None:
    assert escape_block("a\x1b\nb\x07") == "a\\e\nb\\x07"
