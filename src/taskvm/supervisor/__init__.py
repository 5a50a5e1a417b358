"""Sandboxes that outlive the program that started them: one process per user holds them, others talk to it.

`Supervisor` is what a program uses (client.py). `Server` is that process (server.py); the command line makes it.
"""

from taskvm.supervisor.attachment import Attachment
from taskvm.supervisor.client import Supervisor
from taskvm.supervisor.holding import Recipe
from taskvm.supervisor.place import Place
from taskvm.supervisor.server import Server
from taskvm.wire.supervision import (
    ExecStatus,
    Launch,
    SandboxStatus,
    StartRequest,
    SupervisorStatus,
)

__all__ = [
    "Attachment",
    "ExecStatus",
    "Launch",
    "Place",
    "Recipe",
    "SandboxStatus",
    "Server",
    "StartRequest",
    "Supervisor",
    "SupervisorStatus",
]
