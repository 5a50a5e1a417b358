"""Everything that taskfactory raises.

::

    TaskfactoryError
    ├── ConfigError               a file of the user's is wrong; lists every problem with its line
    ├── UnsafePathError           a file that decides about the sandbox lies where the agent can write
    ├── ExtensionError            an extension does not load, or one of its handlers failed
    ├── EnvironmentUnavailable    the sandbox the task must run in cannot start: the task is refused
    ├── EnvironmentLost           the place where the tools act is gone: the session ends
    ├── OperationError            one file operation or command was refused by the system it acts on
    ├── ToolError                 a tool call failed; the text goes to the model
    └── TaskFailed                the agent's work is not what was asked for

Messages say the operation, its operands, the cause and the next step, and never hold a secret's value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TaskfactoryError(Exception):
    """Base of all errors of this package."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a file: where (`file:line`), at which key, and what to do."""

    where: str
    key: str
    text: str

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.key}: {self.text}" if self.key else f"{self.where}: {self.text}"
        )


class ConfigError(TaskfactoryError):
    """Raised when files cannot be used as they are. `problems` has all of them, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a ConfigError names at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class UnsafePathError(TaskfactoryError):
    """Raised when a file that decides about the sandbox lies in the workspace. Move it elsewhere."""


class ExtensionError(TaskfactoryError):
    """Raised when an extension cannot be loaded or its handler failed. The session does not go on without it."""


class EnvironmentUnavailable(TaskfactoryError):  # noqa: N818 - a state of the world, not a slip
    """Raised when the sandbox cannot start. Nothing of the task has run, on the host or elsewhere."""


class EnvironmentLost(TaskfactoryError):  # noqa: N818 - a state of the world, not a slip
    """Raised when the sandbox has ended under a running session. The session ends; nothing moves to the host."""


class OperationError(TaskfactoryError):
    """Raised when a file operation or a command is refused. `errno` is the Linux number, 0 when there is none."""

    def __init__(self, operation: str, cause: str, errno: int = 0) -> None:
        self.operation = operation
        self.cause = cause
        self.errno = errno
        super().__init__(operation, cause, errno)

    def __str__(self) -> str:
        return f"{self.operation}: {self.cause}"


class ToolError(TaskfactoryError):
    """Raised by a tool when a call failed. The model reads the text and may try something else."""


class TaskFailed(TaskfactoryError):  # noqa: N818 - an outcome, not a slip
    """Raised when a task ends without what was asked for, such as an unmet expectation of a script."""
