"""A model that follows a script: turns with text and tool calls, and what each call must answer.

It makes a task repeatable without any model: for demonstrations, for tests, and for the smoke test
of an installation. A script is YAML or JSON, a list of turns::

    - text: I look at the failing test.
      tools:
        - tool: bash
          arguments: {command: python3 -m unittest}
          expect: {is_error: true, contains: [FAILED], not_contains: [Traceback], matches: "Ran \\d+ test"}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from taskfactory.agents.loop import Message, Results, ToolRequest, Turn
from taskfactory.document import Document
from taskfactory.errors import ConfigError, Problem, TaskFailed
from taskfactory.events import ToolResult, escape, escape_block

_SHOWN = 2000  # characters of a result in a failure's text


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the parts of a script: an unknown key is a slip."""


class Expectation(_Value, frozen=True):
    """What a call's result must be. Everything that is given must hold."""

    contains: tuple[str, ...] = ()
    not_contains: tuple[str, ...] = ()
    is_error: bool = False
    matches: str | None = None

    def unmet(self, result: ToolResult) -> list[str]:
        """Return what does not hold, in words."""
        found = [f"+ contains {text!r}" for text in self.contains if text not in result.text]
        found += [
            f"- must not contain {text!r}" for text in self.not_contains if text in result.text
        ]
        if self.matches is not None and not re.search(self.matches, result.text, re.MULTILINE):
            found.append(f"+ matches /{self.matches}/")
        if result.is_error != self.is_error:
            words = ("a success", "an error")
            found.append(f"+ {words[self.is_error]}\n- {words[result.is_error]}")
        return found


class ScriptedCall(_Value, frozen=True):
    """One tool call. Without `expect` it may answer anything."""

    tool: str
    arguments: dict[str, Any] = {}
    expect: Expectation | None = None


class ScriptedTurn(_Value, frozen=True):
    """One turn. The calls of a turn run side by side."""

    text: str = ""
    tools: tuple[ScriptedCall, ...] = ()


class ScriptedModel:
    """Plays a script, and fails the task at the first result that is not what the script expects."""

    def __init__(self, turns: Sequence[ScriptedTurn]) -> None:
        self._turns = tuple(turns)

    @classmethod
    def from_document(cls, document: Document) -> ScriptedModel:
        """Read a script. Raises ConfigError with the line of what is wrong."""
        if not isinstance(document.data, list):
            raise ConfigError([Problem(document.where(), "", "the script is not a list of turns")])
        turns, problems = [], []
        for index, item in enumerate(document.data):
            try:
                turn = msgspec.convert(item, ScriptedTurn)
                _check_patterns(turn)
                turns.append(turn)
            except (msgspec.ValidationError, re.error) as error:
                problems.append(Problem(document.where((index,)), f"[{index}]", str(error)))
        if problems:
            raise ConfigError(problems)
        return cls(turns)

    async def next(self, conversation: Sequence[Message]) -> Turn | None:
        """Check the results of the last turn, then return the next one."""
        played = sum(isinstance(message, Turn) for message in conversation)
        if played and isinstance(conversation[-1], Results):
            _check(played, self._turns[played - 1], conversation[-1])
        if played == len(self._turns):
            return None
        turn = self._turns[played]
        return Turn(turn.text, tuple(_requests(played + 1, turn)))


def _requests(number: int, turn: ScriptedTurn) -> list[ToolRequest]:
    return [
        ToolRequest(f"turn{number}-call{position}", call.tool, call.arguments)
        for position, call in enumerate(turn.tools, 1)
    ]


def _check(number: int, turn: ScriptedTurn, answered: Results) -> None:
    for call, result in zip(turn.tools, answered.results, strict=True):
        unmet = call.expect.unmet(result) if call.expect is not None else []
        if unmet:
            raise TaskFailed(_difference(number, call, result, unmet))


def _difference(number: int, call: ScriptedCall, result: ToolResult, unmet: list[str]) -> str:
    shown = result.text[:_SHOWN] + ("…" if len(result.text) > _SHOWN else "")
    lines = "\n".join(f"  | {escape(line)}" for line in shown.split("\n"))
    arguments = escape(msgspec.json.encode(call.arguments).decode())
    expected = "\n".join(f"  {line}" for text in unmet for line in escape_block(text).split("\n"))
    kind = "error" if result.is_error else "result"
    return (
        f"turn {number}: {call.tool} {arguments} did not answer what the script expects\n"
        f"expected:\n{expected}\n{kind}:\n{lines}"
    )


def _check_patterns(turn: ScriptedTurn) -> None:
    for call in turn.tools:
        if call.expect is not None and call.expect.matches is not None:
            re.compile(call.expect.matches)
