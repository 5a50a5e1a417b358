"""Everything that taskvm raises.

::

    TaskvmError
    ├── UsageError                 the caller's arguments, options or files
    ├── HostError                  this host lacks something or refuses it
    │   ├── UnavailableError       no usable accelerator, no confinement: no sandbox can start here
    │   │   └── NotInstalledError  no QEMU, or no native program of this package
    │   ├── ImageError             a guest image cannot be built, found or trusted
    │   └── CheckpointError        a checkpoint cannot be found, made or trusted
    ├── UpstreamError              a server on the network, beyond the sandbox
    ├── SandboxError               one sandbox
    │   ├── SandboxStateError      the method does not fit the sandbox's state (closed, not started)
    │   ├── SandboxLostError       the virtual machine ended or stopped answering
    │   └── GuestProtocolError     the guest broke the protocol: its sandbox is ended
    ├── GuestError                 the guest answered a request with an errno
    ├── CopyError                  a tree holds what is not copied, or too much of it
    └── CommandError               a command run with ``check=True`` did not exit with 0

Every message says the operation, its operands, the cause and the next step. No message holds a secret's value, and none
a sign that could act on the terminal where it ends up: the guest chooses names and output that are repeated in some.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from taskvm.printing import printable

if TYPE_CHECKING:
    from taskvm.process import ExecResult


class TaskvmError(Exception):
    """Base of all errors of this package.

    ``operation`` is what was attempted, with its operands; ``cause`` why it failed; ``next_step`` what a person
    can do about it (may be empty).
    """

    def __init__(self, operation: str, cause: str, next_step: str = "") -> None:
        self.operation = operation
        self.cause = cause
        self.next_step = next_step
        super().__init__(operation, cause, next_step)

    def __str__(self) -> str:
        text = f"{self.operation}: {self.cause}"
        return _shown(f"{text}. {self.next_step}" if self.next_step else text)


def _shown(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


class UsageError(TaskvmError):
    """Raised when an argument, an option or a configuration file is wrong. Correct it and call again."""


class HostError(TaskvmError):
    """Raised when the host lacks something or refuses it: a tool, a permission, disk space."""


class UnavailableError(HostError):
    """Raised when no sandbox can start on this host. ``taskvm doctor`` explains; nothing was run on the host
    instead.
    """


class NotInstalledError(UnavailableError):
    """Raised when a part that every sandbox needs is not installed on this host: QEMU, or a native program of this
    package. Nothing that a guest does brings it about.
    """


class ImageError(HostError):
    """Raised when a guest image cannot be built, found or verified."""


class CheckpointError(HostError):
    """Raised when a checkpoint is not there, cannot be made, is damaged, does not fit this host, or is not trusted."""


class UpstreamError(TaskvmError):
    """Raised when a server beyond the sandbox cannot be reached or cannot be trusted."""


class SandboxError(TaskvmError):
    """Base of the errors that concern one sandbox."""


class SandboxStateError(SandboxError):
    """Raised when a method is called in a state that does not allow it, such as ``exec`` on a closed sandbox."""


class SandboxLostError(SandboxError):
    """Raised when the virtual machine has ended or no longer answers. Start a new sandbox."""


class GuestProtocolError(SandboxError):
    """Raised when the guest sent something that the protocol forbids. The sandbox is ended; others are not touched."""

    def __init__(self, port: str, reason: str) -> None:
        self.port = port
        self.reason = reason
        super().__init__(
            f"read from the guest's port {port}",
            reason,
            "The guest is broken or hostile: its sandbox was ended",
        )

    def __reduce__(self) -> tuple[type[GuestProtocolError], tuple[str, str]]:
        return type(self), (self.port, self.reason)


class GuestError(TaskvmError):
    """Raised when the guest answers a request with an errno, such as ENOENT for a file that does not exist.

    ``errno`` is the guest's (Linux) number, ``call`` the system call or step that failed.
    """

    def __init__(self, operation: str, errno: int, call: str) -> None:
        self.errno = errno
        self.call = call
        super().__init__(operation, f"{os.strerror(errno)} (errno {errno} of {call} in the guest)")

    def __reduce__(self) -> tuple[type[GuestError], tuple[str, int, str]]:
        return type(self), (self.operation, self.errno, self.call)


class CopyError(TaskvmError):
    """Raised when a tree holds what is not copied between host and guest, such as a device, or more than the limits."""


class CommandError(TaskvmError):
    """Raised by ``exec(..., check=True)`` when the command did not exit with 0. ``result`` holds its output."""

    def __init__(self, command: str, result: ExecResult) -> None:
        self.result = result
        self._command = command
        tail = result.stderr.strip()[-500:] or result.stdout.strip()[-500:]
        super().__init__(
            f"run {command!r} in the guest", f"{result.outcome}; {tail or 'no output'}"
        )

    def __reduce__(self) -> tuple[type[CommandError], tuple[str, ExecResult]]:
        return type(self), (self._command, self.result)
