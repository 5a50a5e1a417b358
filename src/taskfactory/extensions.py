"""Extensions: the user's own code that takes part in sessions. They run on the host with full power.

Rule 1: an extension file never comes from a workspace: an agent could have written it.
Rule 2: an extension that does not load ends the run before anything has started.
Rule 3: who decides and fails has decided against: a throwing `tool_call` handler blocks the call, a
        throwing `tool_result` handler withholds the result, a throwing `user_bash` handler refuses.
Rule 4: every `session_shutdown` handler runs, once, however the session ended.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from taskfactory.agents.operations import Operations
from taskfactory.agents.prompt import SystemPrompt
from taskfactory.errors import ExtensionError
from taskfactory.events import SessionShutdown, SessionStart, ToolCall, ToolResult, UserBash
from taskfactory.workspace import refuse_inside


@dataclass(frozen=True, slots=True)
class Block:
    """A `tool_call` handler's answer: the call does not run. The model reads the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class UserBashReply:
    """The output and exit code of a person's command."""

    output: str
    exit_code: int


OnSessionStart = Callable[[SessionStart], Awaitable[None]]
OnBeforeAgentStart = Callable[[str, SystemPrompt], Awaitable[SystemPrompt | None]]
OnToolCall = Callable[[ToolCall], Awaitable[Block | None]]
OnToolResult = Callable[[ToolResult], Awaitable[ToolResult | None]]
OnUserBash = Callable[[UserBash], Awaitable[Operations | UserBashReply | None]]
OnSessionShutdown = Callable[[SessionShutdown], Awaitable[None]]
WrapOperations = Callable[[Operations], Operations]


class Hooks:
    """What extensions have registered, in the order of their loading.

    The `on_…` methods register a handler and return it, so they serve as decorators. A handler that
    returns None leaves things as they are.
    """

    def __init__(self) -> None:
        self._start: list[OnSessionStart] = []
        self._before: list[OnBeforeAgentStart] = []
        self._call: list[OnToolCall] = []
        self._result: list[OnToolResult] = []
        self._bash: list[OnUserBash] = []
        self._shutdown: list[OnSessionShutdown] = []
        self._wrappers: list[WrapOperations] = []

    # Registering...

    def on_session_start(self, handler: OnSessionStart) -> OnSessionStart:
        """The place is ready. A failing handler ends the session before the first prompt."""
        self._start.append(handler)
        return handler

    def on_before_agent_start(self, handler: OnBeforeAgentStart) -> OnBeforeAgentStart:
        """Gets the task's text and the system prompt; may return another system prompt."""
        self._before.append(handler)
        return handler

    def on_tool_call(self, handler: OnToolCall) -> OnToolCall:
        """May block a call."""
        self._call.append(handler)
        return handler

    def on_tool_result(self, handler: OnToolResult) -> OnToolResult:
        """May replace what the model reads."""
        self._result.append(handler)
        return handler

    def on_user_bash(self, handler: OnUserBash) -> OnUserBash:
        """May answer a person's command, or name the operations that run it. The first answer counts."""
        self._bash.append(handler)
        return handler

    def on_session_shutdown(self, handler: OnSessionShutdown) -> OnSessionShutdown:
        """The session is over and its sandbox released."""
        self._shutdown.append(handler)
        return handler

    def replace_operations(self, wrap: WrapOperations) -> WrapOperations:
        """Replace, or wrap, the operations of all tools."""
        self._wrappers.append(wrap)
        return wrap

    # Firing...

    def operations(self, operations: Operations) -> Operations:
        """Return the operations that the tools use. Raises ExtensionError."""
        for wrap in self._wrappers:
            try:
                operations = wrap(operations)
            except Exception as error:
                raise _failed("operations", wrap, error) from error
        return operations

    async def session_start(self, event: SessionStart) -> None:
        """Raises ExtensionError."""
        for handler in self._start:
            try:
                await handler(event)
            except Exception as error:
                raise _failed("session_start", handler, error) from error

    async def before_agent_start(self, text: str, prompt: SystemPrompt) -> SystemPrompt:
        """Return the system prompt as the handlers want it. Raises ExtensionError."""
        for handler in self._before:
            try:
                prompt = await handler(text, prompt) or prompt
            except Exception as error:
                raise _failed("before_agent_start", handler, error) from error
        return prompt

    async def tool_call(self, event: ToolCall) -> Block | None:
        """Return the first block. A failing handler blocks."""
        for handler in self._call:
            try:
                block = await handler(event)
            except Exception as error:  # noqa: BLE001 - whatever it was, it did not say yes
                return Block(str(_failed("tool_call", handler, error)))
            if block is not None:
                return block
        return None

    async def tool_result(self, result: ToolResult) -> ToolResult:
        """Return the result as the handlers want it. A failing handler withholds it."""
        for handler in self._result:
            try:
                result = await handler(result) or result
            except Exception as error:  # noqa: BLE001 - it may have been about to hide something
                text = f"the result is withheld: {_failed('tool_result', handler, error)}"
                return msgspec.structs.replace(
                    result, text=text, is_error=True, details={}, images=()
                )
        return result

    async def user_bash(self, event: UserBash) -> Operations | UserBashReply | None:
        """Return the first answer. Raises ExtensionError: a failing handler refuses."""
        for handler in self._bash:
            try:
                answer = await handler(event)
            except Exception as error:
                raise _failed("user_bash", handler, error) from error
            if answer is not None:
                return answer
        return None

    async def session_shutdown(self, event: SessionShutdown) -> list[ExtensionError]:
        """Run every handler and return what failed."""
        failures = []
        for handler in self._shutdown:
            try:
                await handler(event)
            except Exception as error:  # noqa: BLE001 - the others must run too
                failures.append(_failed("session_shutdown", handler, error))
        return failures


def load_extension(path: Path, hooks: Hooks, workspace: Path) -> None:
    """Run an extension file's `register(hooks)`. Raises ExtensionError, UnsafePathError."""
    refuse_inside(workspace, path, "extension")
    try:
        spec = importlib.util.spec_from_file_location(f"taskfactory_extension_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ImportError("it is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        module.register(hooks)
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}"
        step = "Correct it, or run without it"
        raise ExtensionError(f"load the extension {path}: {cause}. {step}") from error


def _failed(event: str, handler: object, error: Exception) -> ExtensionError:
    name = getattr(handler, "__qualname__", repr(handler))
    return ExtensionError(
        f"run the {event} handler {name} of an extension: {type(error).__name__}: {error}"
    )
