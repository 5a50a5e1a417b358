"""`taskvm doctor`."""

from __future__ import annotations

import asyncio
import shutil
import sys
import textwrap
from collections.abc import Sequence

import click

import taskvm

_MARKS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
_INDENT = 19  # of the text: the mark, the name of the check, and blanks


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def doctor(as_json: bool) -> None:
    """Explain what this host can do, and what is in the way. Exits with 1 when no sandbox can start."""
    findings = asyncio.run(taskvm.examine())
    if as_json:
        click.echo(taskvm.render_findings(findings))
    else:
        for finding in findings:
            click.echo(_lines(f"{_MARKS[finding.status]} {finding.name:12} {finding.text}"))
            if finding.remedy:
                click.echo(_lines(f"{'':{_INDENT - 3}}-> {finding.remedy}"))
        click.echo(_verdict(findings))
    sys.exit(1 if any(finding.status == "fault" for finding in findings) else 0)


def _lines(text: str) -> str:
    """Return `text` in lines of this terminal, whatever lines its parts came in: QEMU's words have some."""
    width = max(shutil.get_terminal_size().columns, 2 * _INDENT)
    head, body = text[:_INDENT], " ".join(text[_INDENT:].split())
    return textwrap.fill(
        body,
        width,
        initial_indent=head,
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _verdict(findings: Sequence[taskvm.Finding]) -> str:
    faults = [finding.name for finding in findings if finding.status == "fault"]
    if faults:
        return f"No sandbox can start here: mend {', '.join(faults)}."
    return "Sandboxes can start here. Try: taskvm run -- uname -a"
