"""`taskvm doctor`."""

from __future__ import annotations

import asyncio
import sys

import click

import taskvm


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def doctor(as_json: bool) -> None:
    """Explain what this host can do, and what is in the way. Exits with 1 when no sandbox can start."""
    findings = asyncio.run(taskvm.examine())
    if as_json:
        click.echo(taskvm.render_findings(findings))
    else:
        marks = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
        for finding in findings:
            click.echo(f"{marks[finding.status]} {finding.name:12} {finding.text}")
            if finding.remedy:
                click.echo(f"{'':19}{finding.remedy}")
    sys.exit(1 if any(finding.status == "fault" for finding in findings) else 0)
