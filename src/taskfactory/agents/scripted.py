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
from dataclasses import dataclass
from typing import Any

import msgspec

from taskfactory.agents.loop import Message, Results, ToolRequest, Turn, UserCommand
from taskfactory.document import Document
from taskfactory.errors import ConfigError, Problem, TaskFailed
from taskfactory.events import escape, escape_block

_SHOWN = 2000  # characters of a result in a failure's text


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the parts of a script: an unknown key is a slip."""


class Expectation(_Value, frozen=True):
    """What a call's result must be. Everything that is given must hold."""

    contains: tuple[str, ...] = ()
    not_contains: tuple[str, ...] = ()
    is_error: bool = False
    matches: str | None = None

    def unmet(self, answer: _Answer) -> list[str]:
        """Return what does not hold, in words."""
        found = [f"+ contains {text!r}" for text in self.contains if text not in answer.text]
        found += [
            f"- must not contain {text!r}" for text in self.not_contains if text in answer.text
        ]
        if self.matches is not None and not re.search(self.matches, answer.text, re.MULTILINE):
            found.append(f"+ matches /{self.matches}/")
        if answer.is_error != self.is_error:
            words = ("a success", "an error")
            found.append(f"+ {words[self.is_error]}\n- {words[answer.is_error]}")
        return found


class ScriptedCall(_Value, frozen=True):
    """One tool call. Without `expect` it may answer anything."""

    tool: str
    arguments: dict[str, Any] = {}
    expect: Expectation | None = None


class ScriptedCommand(_Value, frozen=True):
    """A command that a person runs. Its result is an error when its exit code is not 0."""

    command: str
    expect: Expectation | None = None


class ScriptedTurn(_Value, frozen=True):
    """One turn: a person's commands, one after the other, then the agent's calls, side by side."""

    text: str = ""
    user_bash: tuple[ScriptedCommand, ...] = ()
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
        turns = [at for at, message in enumerate(conversation) if isinstance(message, Turn)]
        played = len(turns)
        if turns:
            _check(played, self._turns[played - 1], conversation[turns[-1] + 1 :])
        if played == len(self._turns):
            return None
        turn = self._turns[played]
        commands = tuple(each.command for each in turn.user_bash)
        return Turn(turn.text, tuple(_requests(played + 1, turn)), commands)


def _requests(number: int, turn: ScriptedTurn) -> list[ToolRequest]:
    return [
        ToolRequest(f"turn{number}-call{position}", call.tool, call.arguments)
        for position, call in enumerate(turn.tools, 1)
    ]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came of a call or a command."""

    text: str
    is_error: bool


def _check(number: int, turn: ScriptedTurn, answered: Sequence[Message]) -> None:
    replies = [each.reply for each in answered if isinstance(each, UserCommand)]
    for command, reply in zip(turn.user_bash, replies, strict=False):
        answer = _Answer(reply.output, reply.exit_code != 0)
        _hold(number, f"! {escape(command.command)}", command.expect, answer)
    results = [result for each in answered if isinstance(each, Results) for result in each.results]
    for call, result in zip(turn.tools, results, strict=True):
        arguments = escape(msgspec.json.encode(call.arguments).decode())
        answer = _Answer(result.text, result.is_error)
        _hold(number, f"{call.tool} {arguments}", call.expect, answer)


def _hold(number: int, what: str, expect: Expectation | None, answer: _Answer) -> None:
    unmet = expect.unmet(answer) if expect is not None else []
    if unmet:
        raise TaskFailed(_difference(number, what, answer, unmet))


def _difference(number: int, what: str, answer: _Answer, unmet: list[str]) -> str:
    shown = answer.text[:_SHOWN] + ("…" if len(answer.text) > _SHOWN else "")
    lines = "\n".join(f"  | {escape(line)}" for line in shown.split("\n"))
    expected = "\n".join(f"  {line}" for text in unmet for line in escape_block(text).split("\n"))
    kind = "error" if answer.is_error else "result"
    return (
        f"turn {number}: {what} did not answer what the script expects\n"
        f"expected:\n{expected}\n{kind}:\n{lines}"
    )


def _check_patterns(turn: ScriptedTurn) -> None:
    for expect in [each.expect for each in turn.user_bash] + [each.expect for each in turn.tools]:
        if expect is not None and expect.matches is not None:
            re.compile(expect.matches)
