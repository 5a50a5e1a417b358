"""`taskvm log`: what a sandbox asked for, and what was decided."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import click
import msgspec

import taskvm
from taskvm import UsageError

MAX_TOLD = 5  # hosts that `taskvm run` names at its end


@click.command(short_help="Print what a sandbox asked for, and what was decided.")
@click.option("--follow", "-f", is_flag=True, help="Go on as the log grows, until Ctrl-C.")
@click.option("--denied", is_flag=True, help="Only what was refused.")
@click.option(
    "--exec",
    "number",
    type=int,
    metavar="ID",
    help="Only what this command connected to: the number that `taskvm ps` has, Process.id in Python.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the lines as they are.")
@click.argument("log", required=False)
def log(log: str | None, follow: bool, denied: bool, number: int | None, as_json: bool) -> None:
    """Print the audit log LOG: a file, or a sandbox's id or name. [default: of the newest sandbox]"""
    events = taskvm.read_audit(find_log(log), follow=follow)
    for event in events:
        if (denied and event.decision != "deny") or number not in (None, event.exec):
            continue
        text = msgspec.json.encode(event).decode() if as_json else render(event)
        click.echo(text)
        sys.stdout.flush()


def tell_refused(path: Path, sandbox: str) -> None:
    """Say on standard error what `sandbox` was refused: its programs may only have seen that a name does not exist."""
    refused: dict[str, str] = {}
    with contextlib.suppress(UsageError):  # there is no record, or none any more
        for event in taskvm.read_audit(path):
            where = event.host or event.address
            if event.sandbox == sandbox and event.decision == "deny" and where:
                refused.setdefault(where, event.reason)
            if len(refused) > MAX_TOLD:
                break
    for where, reason in [*refused.items()][:MAX_TOLD]:
        click.echo(f"taskvm: refused: {where}: {reason}", err=True)
    if len(refused) > MAX_TOLD:
        click.echo(f"taskvm: and more was refused: taskvm log --denied {path}", err=True)


def find_log(name: str | None) -> Path:
    """Return the audit log of a file's path, or of a sandbox by its id, or by the name it has in the supervisor.

    Raises UsageError.
    """
    try:
        return taskvm.find_audit_log(name)
    except UsageError:
        held = asyncio.run(taskvm.Supervisor().list(ended=True)) if name else []
        named = [each.id for each in held if each.name == name]
        if not named:
            raise
        return taskvm.find_audit_log(named[-1])


def render(event: taskvm.AuditEvent) -> str:
    """Return one line for a person. All of it was made printable when it was written."""
    where = event.host or event.address
    if event.port:
        where += f":{event.port}"
    if event.kind == "request" and event.method:
        where = f"{event.method} {event.scheme or 'http'}://{where}{event.path}"
    facts = [where] if where else []
    if event.kind == "response":
        facts.append(f"{event.status}, {event.bytes_up} up, {event.bytes_down} down")
        facts.append(f"{event.duration_ms} ms")
    if event.secrets:
        facts.append(f"secrets {', '.join(event.secrets)}")
    if event.exec and event.kind == "request":
        facts.append(f"exec {event.exec}")
    why = ": ".join(filter(None, (event.rule, event.reason)))
    said = ", ".join(facts) + (f" ({why})" if why else "")
    line = f"{event.time[11:23]} {event.decision:5} {event.kind:8} {said}"
    return "".join(sign if sign.isprintable() else "?" for sign in line)
