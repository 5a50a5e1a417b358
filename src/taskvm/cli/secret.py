"""`taskvm secret`: the secrets of a running sandbox."""

from __future__ import annotations

import asyncio

import click

import taskvm
from taskvm.cli import complete
from taskvm.cli.secrettext import read_secret


@click.group()
def secret() -> None:
    """Add, replace and revoke the secrets of a running sandbox."""


@secret.command(short_help="Add a secret, or give one another value.")
@click.argument("sandbox", shell_complete=complete.sandboxes)
@click.argument("secret", metavar="NAME@HOST[,…]")
def put(sandbox: str, secret: str) -> None:
    """Give SANDBOX the value of the variable NAME for these hosts, as --secret, and print its placeholder.

    A secret of this name keeps its placeholder and gets the new value. Commands that start from now
    on find the placeholder in $NAME.
    """
    click.echo(asyncio.run(taskvm.Supervisor().put_secret(sandbox, read_secret(secret))))


@secret.command(short_help="Let a secret go nowhere from now on.")
@click.argument("sandbox", shell_complete=complete.sandboxes)
@click.argument("name")
def revoke(sandbox: str, name: str) -> None:
    """Let the secret NAME of SANDBOX go nowhere from now on."""
    asyncio.run(taskvm.Supervisor().revoke_secret(sandbox, name))
