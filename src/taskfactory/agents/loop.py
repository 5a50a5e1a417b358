"""An agent's session: the model speaks, its tool calls run, the results go back, until it is done.

Rule 1: the calls of one turn run side by side; their results return in the order of the calls.
Rule 2: an extension that blocks a call, or fails while it decides, keeps the call from running.
Rule 3: a failing call is a result the model reads. Only the loss of the place, or a mistake in our
        own code, ends the session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from taskfactory.agents.bashtool import OutputBuffer
from taskfactory.agents.operations import Operations
from taskfactory.agents.place import Place
from taskfactory.agents.prompt import build_system_prompt
from taskfactory.agents.tools import AnyTool, FileLocks, ToolContext, ToolOutput, builtin_tools
from taskfactory.errors import OperationError, TaskFailed, ToolError
from taskfactory.events import (
    AgentText,
    AnyEvent,
    BeforeAgentStart,
    ToolCall,
    ToolResult,
    ToolUpdate,
    UserBash,
    UserBashResult,
)
from taskfactory.extensions import Hooks, UserBashReply

# An agent that has not finished by then turns in circles.
MAX_TURNS = 500
# What a model may ask for at once.
MAX_CALLS_PER_TURN = 64
# A shell's exit code for a command that could not be started.
CANNOT_RUN = 126

Emit = Callable[[AnyEvent], None]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is told at the beginning."""

    system: str
    text: str


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """One tool call as the model asks for it."""

    call_id: str
    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model says, and the tools it wants.

    `user_bash` has commands that a person runs before these tools; only a script has any, which is a whole session's.
    """

    text: str = ""
    calls: tuple[ToolRequest, ...] = ()
    user_bash: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Results:
    """The results of a turn's calls, in their order."""

    results: tuple[ToolResult, ...]


@dataclass(frozen=True, slots=True)
class UserCommand:
    """A command that a person ran, and what came of it."""

    command: str
    reply: UserBashReply


Message = Prompt | Turn | Results | UserCommand


class Model(Protocol):
    """Whoever decides what to do next."""

    async def next(self, conversation: Sequence[Message]) -> Turn | None:
        """Return the next turn, or None when there is nothing left to do. Raises TaskFailed."""
        ...


class AgentSession:
    """One agent at work in one place."""

    def __init__(
        self, place: Place, hooks: Hooks, emit: Emit, tools: Sequence[AnyTool] | None = None
    ) -> None:
        self._place = place.with_operations(hooks.operations(place.operations))
        self._hooks = hooks
        self._emit = emit
        self._tools = {tool.name: tool for tool in (builtin_tools() if tools is None else tools)}
        self._locks = FileLocks()
        self._unread: list[UserCommand] = []

    async def run(self, model: Model, task_text: str) -> None:
        """Let the model work on the task until it is done. Raises TaskFailed, EnvironmentLost."""
        conversation: list[Message] = [await self._prompt(task_text)]
        for _ in range(MAX_TURNS):
            conversation += self._unread
            self._unread.clear()
            turn = await model.next(tuple(conversation))
            if turn is None:
                return
            conversation.append(turn)
            if turn.text:
                self._emit(AgentText(text=turn.text))
            for command in turn.user_bash:
                await self.user_bash(command)
            if turn.calls:
                conversation.append(Results(await self._call_all(turn.calls)))
        raise TaskFailed(f"the agent was not done after {MAX_TURNS} turns")

    async def user_bash(self, command: str) -> UserBashReply:
        """Run a person's command (`!command`) where the tools act; the model reads of it before its next turn.

        Raises ExtensionError when a handler fails: nothing is run then. Raises EnvironmentLost.
        """
        event = UserBash(command=command, cwd=self._place.paths.root)
        self._emit(event)
        answer = await self._hooks.user_bash(event)
        if not isinstance(answer, UserBashReply):
            answer = await self._run_for_user(answer or self._place.operations, event)
        self._unread.append(UserCommand(command, answer))
        self._emit(UserBashResult(command=command, text=answer.output, exit_code=answer.exit_code))
        return answer

    async def _run_for_user(self, operations: Operations, event: UserBash) -> UserBashReply:
        output = OutputBuffer()

        def on_output(data: bytes) -> bool:
            output.add(data)
            return True

        try:
            ending = await operations.exec(
                self._place.paths.map_text(event.command), cwd=event.cwd, on_output=on_output
            )
        except OperationError as error:
            return UserBashReply(str(error), CANNOT_RUN)
        return UserBashReply(output.end().text, ending.exit_code)

    async def _prompt(self, task_text: str) -> Prompt:
        text = self._place.paths.map_text(task_text)
        built = build_system_prompt(tuple(self._tools.values()), self._place)
        system = (await self._hooks.before_agent_start(text, built)).render()
        self._emit(BeforeAgentStart(prompt=text, system_prompt=system))
        return Prompt(system=system, text=text)

    # Tool calls...

    async def _call_all(self, calls: Sequence[ToolRequest]) -> tuple[ToolResult, ...]:
        if len(calls) > MAX_CALLS_PER_TURN:
            raise TaskFailed(f"the agent asked for {len(calls)} tool calls at once")
        try:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(self._call(request)) for request in calls]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None  # the first one cancelled the others
        return tuple(task.result() for task in running)

    async def _call(self, request: ToolRequest) -> ToolResult:
        call = ToolCall(
            call_id=request.call_id, tool=request.tool, arguments=dict(request.arguments)
        )
        self._emit(call)
        result = await self._hooks.tool_result(await self._execute(call))
        self._emit(result)
        return result

    async def _execute(self, call: ToolCall) -> ToolResult:
        block = await self._hooks.tool_call(call)
        if block is not None:
            return _failed(call, f"{call.tool} was blocked: {block.reason}")
        tool = self._tools.get(call.tool)
        if tool is None:
            return _failed(call, f"there is no tool {call.tool!r}; tools: {', '.join(self._tools)}")
        try:
            output = await tool.run(call.arguments, self._context(call.call_id))
        except ToolError as error:
            return _failed(call, str(error))
        return _succeeded(call, output)

    def _context(self, call_id: str) -> ToolContext:
        return ToolContext(
            operations=self._place.operations,
            paths=self._place.paths,
            locks=self._locks,
            on_update=lambda text: self._emit(ToolUpdate(call_id=call_id, text=text)),
        )


def _failed(call: ToolCall, text: str) -> ToolResult:
    return ToolResult(call_id=call.call_id, tool=call.tool, text=text, is_error=True)


def _succeeded(call: ToolCall, output: ToolOutput) -> ToolResult:
    details = dict(output.details)
    if output.images:
        details["images"] = [image.media_type for image in output.images]
    return ToolResult(
        call_id=call.call_id,
        tool=call.tool,
        text=output.text,
        details=details,
        images=tuple(output.images),
    )
