"""What `taskvm supervisor run` is made of: the whole engine, which the other commands do without."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from collections.abc import Callable
from logging.handlers import RotatingFileHandler

import taskvm
from taskvm import UsageError
from taskvm.cli.options import SandboxArguments, published
from taskvm.supervisor.holding import Recipe
from taskvm.supervisor.place import Place
from taskvm.supervisor.server import Server
from taskvm.wire.supervision import StartRequest

# Starts, ends and failures of sandboxes are a line each; one older file of this size is kept.
LOG_BYTES = 256 * 1024
# A sandbox takes some twenty, and each mount more: the usual 1024 would do for fifty.
DESCRIPTORS = 16384


def serve(place: Place, linger_s: float, ready: int | None) -> None:
    """Be the supervisor until it has been idle for `linger_s`; with `ready`, say so on that descriptor."""
    _log_to(place, foreground=ready is None)
    _raise_descriptor_limit()
    asyncio.run(_serve(Server(place, make_recipe, taskvm.__version__, linger_s), ready))


async def _serve(server: Server, ready: int | None) -> None:
    def on_ready() -> None:
        if ready is not None:
            os.write(ready, b"ready\n")
            os.close(ready)

    await server.run(on_ready)


def make_recipe(request: StartRequest, on_progress: Callable[[str], None]) -> Recipe:
    """Return the sandbox that `request` asks for, to be started. Raises UsageError."""
    arguments = SandboxArguments.of(request.options)
    if SandboxArguments.of(arguments.portable()) != arguments:
        # "." would be this process's own working directory, which is "/".
        raise UsageError(
            "start a sandbox in the supervisor", "a path is relative", "Write absolute paths"
        )
    return Recipe(
        starting=arguments.create(request.variables, on_progress),
        image=arguments.image,
        idle_timeout_s=arguments.idle_timeout,
        max_duration_s=arguments.max_duration,
        ports=[published(text) for text in arguments.publish],
    )


def _raise_descriptor_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if most == resource.RLIM_INFINITY else min(DESCRIPTORS, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _log_to(place: Place, *, foreground: bool) -> None:
    handlers: list[logging.Handler] = [
        RotatingFileHandler(place.log, maxBytes=LOG_BYTES, backupCount=1)
    ]
    if foreground:
        handlers.append(logging.StreamHandler())
    text = "%(asctime)s %(process)d %(levelname)s %(message)s"
    logging.basicConfig(handlers=handlers, level=logging.INFO, format=text)
