"""What happens in an agent's session, as values, and as one line of a terminal.

Rule: text of a model or a tool is hostile. It reaches a terminal only through `escape` or as JSON, which leave
no control byte, no bidirectional override and no line break in it.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

MAX_LINE = 400  # characters of one rendered line

# C0, DEL and C1 (ECMA-48); line and paragraph separators; the marks and overrides of UAX #9; the
# zero-width signs; the tag characters, which hide text from a person; lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\x1b": "\\e"}


class Image(msgspec.Struct, frozen=True, rename="camel"):
    """A picture for a model that can see."""

    media_type: str
    data: bytes


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", rename="camel"):
    """Base of all events; the tag is the event's name."""


class SessionStart(Event, frozen=True, tag="session_start"):
    """The place where the tools act is ready. Fires once, before the agent's first prompt."""

    task_id: str
    sandboxed: bool
    cwd: str
    place: str


class BeforeAgentStart(Event, frozen=True, tag="before_agent_start"):
    """The agent is about to get its prompt."""

    prompt: str
    system_prompt: str


class AgentText(Event, frozen=True, tag="agent_text"):
    """The model said something."""

    text: str


class ToolCall(Event, frozen=True, tag="tool_call"):
    """The model asks for a tool."""

    call_id: str
    tool: str
    arguments: dict[str, Any]


class ToolUpdate(Event, frozen=True, tag="tool_update"):
    """A running tool has new output."""

    call_id: str
    text: str


class ToolResult(Event, frozen=True, tag="tool_result"):
    """A tool call has ended. `text` is what the model reads, `images` what it sees; JSON leaves the latter out."""

    call_id: str
    tool: str
    text: str
    is_error: bool = False
    details: dict[str, Any] = {}
    images: tuple[Image, ...] = ()


class UserBash(Event, frozen=True, tag="user_bash"):
    """The user, not the model, runs a command where the agent's tools act; `cwd` is a directory there."""

    command: str
    cwd: str


class UserBashResult(Event, frozen=True, tag="user_bash_result"):
    """A command of the user's has ended. The model reads it before its next turn."""

    command: str
    text: str
    exit_code: int


class Status(Event, frozen=True, tag="status"):
    """Progress of the surroundings: a sandbox starting, an extension's remark."""

    text: str


class SessionShutdown(Event, frozen=True, tag="session_shutdown"):
    """The session is over, however it went: `success`, `failure`, `error` or `cancelled`. Fires once."""

    outcome: str


AnyEvent = (
    SessionStart
    | BeforeAgentStart
    | AgentText
    | ToolCall
    | ToolUpdate
    | ToolResult
    | UserBash
    | UserBashResult
    | Status
    | SessionShutdown
)


def escape(text: str) -> str:
    """Return `text` with every character that could act on a terminal, or hide in it, made visible."""
    return _UNSAFE.sub(_visible, text)


def escape_block(text: str) -> str:
    """Return a text of several lines, each of them escaped."""
    return "\n".join(escape(line) for line in text.split("\n"))


def render_line(event: AnyEvent) -> str:
    """Return an event as one safe line for a terminal."""
    line = escape(_text(event))
    return line if len(line) <= MAX_LINE else line[: MAX_LINE - 1] + "…"


def to_json(event: AnyEvent) -> bytes:
    """Return an event as one line of JSON, without the newline and without pictures' data."""
    if isinstance(event, ToolResult) and event.images:
        event = msgspec.structs.replace(event, images=())  # megabytes; `details` has their kinds
    return json_line(event)


def json_line(value: object) -> bytes:
    """Return a value as one line of JSON that a terminal can show. A lone surrogate becomes `?`."""
    try:
        data = msgspec.json.encode(value)
    except UnicodeEncodeError:
        data = msgspec.json.encode(_encodable(msgspec.to_builtins(value)))
    return _UNSAFE.sub(_json_escape, data.decode()).encode()


def _json_escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


def _encodable(value: Any) -> Any:
    """A file's name that is no UTF-8 has surrogates in Python, and JSON has no way to say them."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list) else value


def _text(event: AnyEvent) -> str:
    match event:
        case SessionStart():
            return f"session  {event.place} in {event.cwd}"
        case BeforeAgentStart():
            return f"prompt   {event.prompt.strip()}"
        case AgentText():
            return f"agent    {event.text.strip()}"
        case ToolCall():
            return f"{event.tool:<8} {_summary(event)}"
        case ToolUpdate():
            return f"         {event.text.rstrip()}"
        case ToolResult():
            return f"{'  error' if event.is_error else '  ok':<8} {event.text.strip()}"
        case UserBash():
            return f"!        {event.command}"
        case UserBashResult():
            return f"  exit {event.exit_code:<2}{event.text.strip()}"
        case Status():
            return f"status   {event.text}"
        case SessionShutdown():
            return f"session  over: {event.outcome}"


def _summary(call: ToolCall) -> str:
    for key in ("command", "path", "pattern"):
        value = call.arguments.get(key)
        if isinstance(value, str):
            return value
    return msgspec.json.encode(call.arguments).decode()


def _visible(match: re.Match[str]) -> str:
    sign = match.group()
    return _SHORT.get(sign) or (
        f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{{{ord(sign):x}}}"
    )
