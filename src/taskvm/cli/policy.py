"""`taskvm policy`: what may leave, explained without starting anything, and changed while a sandbox runs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import click

import taskvm
from taskvm import UsageError
from taskvm.cli import complete
from taskvm.cli.log import find_log
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


@policy.command(short_help="Say what would happen to a request, and why.")
@policy_options
@click.option("--passthrough", multiple=True, metavar="HOST", help="TLS to it is not intercepted.")
@click.option("--method", default="GET", show_default=True, help="The request's method.")
@click.argument("url")
def check(
    url: str,
    method: str,
    passthrough: tuple[str, ...],
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
    explanation = taskvm.explain(
        rules, url, method=method.upper(), resolve=read_table(resolve), passthrough=passthrough
    )
    click.echo(explanation.request)
    for step in explanation.steps:
        click.echo(f"  {step.subject:8} {_say(step.decision)}")
    if explanation.allowed and explanation.steps[-1].subject != "address":
        click.echo("  address  judged when it is known: a public one is allowed, no other")
    click.echo("allowed" if explanation.allowed else "refused")
    sys.exit(0 if explanation.allowed else EXIT_REFUSED)


@policy.command(short_help="Print the policy of options, or of a sandbox.")
@policy_options
@click.argument("sandbox", required=False, shell_complete=complete.sandboxes)
def show(
    sandbox: str | None,
    policy_file: str | None,
    allow: tuple[str, ...],
    allow_addresses: tuple[str, ...],
    resolve: tuple[str, ...],
) -> None:
    """Print the policy that the options mean, or that holds for the running SANDBOX, as a policy file."""
    read_table(resolve)
    rules = read_policy(policy_file, allow, allow_addresses)
    if sandbox is not None:
        if rules != taskvm.Policy():
            raise UsageError(f"show the policy of {sandbox}", "options say another one")
        rules = asyncio.run(taskvm.Supervisor().policy(sandbox))
    click.echo(rules.to_toml(), nl=False)


@policy.command(short_help="Change what a running sandbox may reach.")
@click.option("--policy", "policy_file", metavar="FILE", help="Replace it by this policy file.")
@click.option("--allow", multiple=True, metavar="HOST", help="Allow a host, after all rules.")
@click.option("--deny", multiple=True, metavar="HOST", help="Deny a host, before all rules.")
@click.argument("sandbox", shell_complete=complete.sandboxes)
def change(
    sandbox: str, policy_file: str | None, allow: tuple[str, ...], deny: tuple[str, ...]
) -> None:
    """Change what the running SANDBOX may reach, and print what holds then, as a policy file.

    Open connections that might not be allowed any more are cut at once.
    """
    rules = taskvm.Policy.from_file(policy_file) if policy_file else None
    changing = taskvm.Supervisor().change_policy(sandbox, rules, allow=allow, deny=deny)
    click.echo(asyncio.run(changing).to_toml(), nl=False)


@policy.command(short_help="Print the smallest policy that a log needs.")
@click.argument("log", required=False)
def suggest(log: str | None) -> None:
    """Print the smallest policy file that allows what the audit log LOG says was used.

    LOG is a file, or a sandbox's id or name. [default: of the newest sandbox] What was refused is listed in
    comments. Read it before you use it: what was used was not always needed.
    """
    click.echo(taskvm.suggest_policy(taskvm.read_audit(find_log(log))).to_toml(), nl=False)


def _say(decision: taskvm.Decision) -> str:
    verdict = "allow" if decision.allowed else "deny "
    hint = f". {decision.hint}" if decision.hint else ""
    return f"{verdict} by {decision.rule}: {decision.reason}{hint}"
