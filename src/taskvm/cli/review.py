"""What becomes of changes under review when `taskvm run` ends: shown, written as a patch, applied.

Nothing is lost without a word: who mounts a directory for review and has no terminal says beforehand what shall happen.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import click

import taskvm
from taskvm import UsageError
from taskvm.cli.streams import STDERR, STDIN

Apply = Literal["ask", "all", "none"]
# Lines of a summary; the numbers of each kind are always told.
MAX_SHOWN = 40

apply_option = click.option(
    "--apply",
    type=click.Choice(get_args(Apply)),
    help="Changes in mounts for review: ask, apply all, or none. [default: ask on a terminal]",
)
diff_option = click.option(
    "--diff",
    "diff_file",
    metavar="FILE",
    help="Write the changes in mounts for review to FILE, as a patch for git apply.",
)


@dataclass(frozen=True, slots=True)
class Review:
    """What the user wants of the changes in the guest's directories `paths`."""

    paths: tuple[str, ...]
    apply: Apply
    diff_file: Path | None

    @classmethod
    def of(cls, paths: tuple[str, ...], apply: Apply | None, diff_file: str | None) -> Review:
        """Check the options against each other. Raises UsageError."""
        if not paths:
            for option, value in (("apply", apply), ("diff", diff_file)):
                if value is not None:
                    raise UsageError(
                        f"use --{option}",
                        "no directory is mounted for review",
                        "Mount one: HOST:GUEST:review",
                    )
        terminal = os.isatty(STDIN) and os.isatty(STDERR)
        if apply is None:
            apply = "ask" if terminal and diff_file is None else "none"
            if paths and apply == "none" and diff_file is None:
                raise UsageError(
                    f"review {', '.join(paths)}",
                    "there is no terminal to ask on, and the changes would be lost",
                    "Say --diff FILE, --apply all or --apply none",
                )
        if apply == "ask" and not terminal:
            raise UsageError(
                "use --apply ask", "there is no terminal", "Say --apply all, or --diff FILE"
            )
        file = None if diff_file is None else Path(diff_file)
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"write the patch {file}", "its directory does not exist")
        if file is not None and file.is_dir():
            raise UsageError(f"write the patch {file}", "it is a directory", "Name a file in it")
        return cls(paths, apply, file)

    async def take(self, vm: taskvm.Sandbox) -> list[tuple[str, taskvm.ChangeSet]]:
        """Take the changes of a sandbox that is about to be closed."""
        return [(path, await vm.changes(path)) for path in self.paths]

    def settle(self, taken: Sequence[tuple[str, taskvm.ChangeSet]]) -> bool:
        """Do as the user wishes, and close the sets. Returns whether all that was to be applied was."""
        patches, good = [], True
        for path, changes in taken:
            with changes:
                _summarise(path, list(changes))
                if self.diff_file is not None:
                    patches.append(changes.diff(binary=True))
                if len(changes) and self.apply != "none":
                    good = self._apply(changes) and good
        if self.diff_file is not None:
            kept = _keep("".join(patches).encode("utf-8", "surrogateescape"), self.diff_file)
            _tell(f"the patch is in {kept}")
            good = good and kept == self.diff_file
        return good

    def _apply(self, changes: taskvm.ChangeSet) -> bool:
        if self.apply == "all":
            return _report(changes.apply())
        answer = ""
        while answer not in ("y", "n"):
            answer = _ask("taskvm: apply? [y]es, [n]o, show the [d]iff")
            if answer == "d":
                for line in changes.diff().split("\n"):
                    click.echo(taskvm.printable(line), err=True)
        return answer == "n" or _report(changes.apply(guarded=_wants_guarded(changes)))


def _keep(patch: bytes, file: Path) -> Path:
    """Write a patch, to another file where that one refuses: the sandbox is gone, and this is all that is left."""
    try:
        file.write_bytes(patch)
    except OSError as error:
        _tell(f"write the patch {file}: {error.strerror or error}")
        descriptor, name = tempfile.mkstemp(prefix="taskvm-", suffix=".patch")
        with open(descriptor, "wb") as other:
            other.write(patch)
        return Path(name)
    return file


def _wants_guarded(changes: taskvm.ChangeSet) -> bool:
    guarded = [change for change in changes if change.guard and not change.refusal]
    if not guarded:
        return False
    _tell("your own programs run or obey what is in these files:")
    _list(guarded)
    return _ask("taskvm: apply these too? [y]es, [n]o") == "y"


def _ask(question: str) -> str:
    answer: str = click.prompt(question, default="", show_default=False, err=True)
    return answer.strip().lower()[:1]


def _summarise(path: str, changes: Sequence[taskvm.Change]) -> None:
    counts = Counter(change.kind for change in changes)
    told = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    _tell(f"changes in {taskvm.printable(path)}: {told or 'none'}")
    # Deletions, and what will not just be applied, first: a long list must not hide them.
    _list(sorted(changes, key=lambda change: (not change.obstacle, change.kind != "deleted")))


def _list(changes: Sequence[taskvm.Change]) -> None:
    for change in changes[:MAX_SHOWN]:
        click.echo(f"  {change}", err=True)
    if len(changes) > MAX_SHOWN:
        click.echo(f"  … and {len(changes) - MAX_SHOWN} more", err=True)


def _report(outcomes: Sequence[taskvm.Outcome]) -> bool:
    left = [outcome for outcome in outcomes if outcome.status != "applied"]
    _tell(f"applied {len(outcomes) - len(left)} of {len(outcomes)} changes")
    for outcome in left[:MAX_SHOWN]:
        click.echo(f"  not applied  {taskvm.printable(outcome.path)}: {outcome.reason}", err=True)
    if len(left) > MAX_SHOWN:
        click.echo(f"  … and {len(left) - MAX_SHOWN} more", err=True)
    return not left


def _tell(line: str) -> None:
    click.echo(f"taskvm: {line}", err=True)
