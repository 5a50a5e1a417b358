"""`taskvm policy`: what may leave, explained without starting anything."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from taskvm import Decision, explain, find_audit_log, read_audit, suggest_policy
from taskvm.cli.options import POLICY_OPTIONS, read_policy, read_table

EXIT_REFUSED = 1


def policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the options that say what may leave."""
    for option in reversed(POLICY_OPTIONS):
        command = option(command)
    return command


@click.group()
def policy() -> None:
    """Explain what may leave a sandbox."""


@policy.command()
@policy_options
@click.option("--method", default="GET", show_default=True, help="The request's method.")
@click.argument("url")
def check(
    url: str,
    method: str,
    policy_file: str | None,
    allow: tuple[str, ...],
    allow_addresses: tuple[str, ...],
    resolve: tuple[str, ...],
) -> None:
    """Say what would happen to a request for URL, and which rule decides.

    Nothing is looked up or sent: the address is judged when it is in the URL or in --resolve. Exits
    with 0 when the request is allowed, with 1 when it is refused.
    """
    rules = read_policy(policy_file, allow, allow_addresses)
    explanation = explain(rules, url, method=method.upper(), resolve=read_table(resolve))
    click.echo(explanation.request)
    for step in explanation.steps:
        click.echo(f"  {step.subject:8} {_say(step.decision)}")
    if explanation.allowed and explanation.steps[-1].subject != "address":
        click.echo("  address  judged when it is known: a public one is allowed, no other")
    click.echo("allowed" if explanation.allowed else "refused")
    sys.exit(0 if explanation.allowed else EXIT_REFUSED)


@policy.command()
@policy_options
def show(
    policy_file: str | None,
    allow: tuple[str, ...],
    allow_addresses: tuple[str, ...],
    resolve: tuple[str, ...],
) -> None:
    """Print the policy that the options mean, as a policy file."""
    read_table(resolve)
    click.echo(read_policy(policy_file, allow, allow_addresses).to_toml(), nl=False)


@policy.command()
@click.argument("log", required=False)
def suggest(log: str | None) -> None:
    """Print the smallest policy file that allows what the audit log LOG says was used.

    LOG is a file, or a sandbox's id. [default: of the newest sandbox] What was refused is listed in
    comments. Read it before you use it: what was used was not always needed.
    """
    click.echo(suggest_policy(read_audit(find_audit_log(log))).to_toml(), nl=False)


def _say(decision: Decision) -> str:
    verdict = "allow" if decision.allowed else "deny "
    hint = f". {decision.hint}" if decision.hint else ""
    return f"{verdict} by {decision.rule}: {decision.reason}{hint}"
