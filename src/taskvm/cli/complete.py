"""What a shell offers for the names of sandboxes, images and checkpoints.

A completion that fails must not write over the line that is being typed: it offers nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import click

import taskvm
from taskvm import TaskvmError


def sandboxes(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete SANDBOX: the names of those that run, and the ids of those without one."""
    try:
        running = asyncio.run(taskvm.Supervisor().list())
    except TaskvmError:
        return []
    return _starting([each.name or each.id for each in running], incomplete)


def images(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of an image."""
    try:
        return _starting(taskvm.ImageStore().names(), incomplete)
    except TaskvmError:
        return []


def checkpoints(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a checkpoint."""
    try:
        return _starting(taskvm.CheckpointStore().names(), incomplete)
    except TaskvmError:
        return []


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in sorted(names) if name.startswith(incomplete)]
