"""`taskvm completion`: the script that lets a shell complete commands, options, and names (`complete.py`)."""

from __future__ import annotations

import click

from taskvm.cli.help import examples

# click derives this variable from the program's name: the script sets it, and click answers instead of running.
_VARIABLE = "_TASKVM_COMPLETE"


@click.command(
    short_help="Print the script that completes commands in your shell.",
    epilog=examples(
        "bash: echo 'eval \"$(taskvm completion bash)\"' >> ~/.bashrc",
        "zsh:  echo 'eval \"$(taskvm completion zsh)\"' >> ~/.zshrc",
        "fish: taskvm completion fish > ~/.config/fish/completions/taskvm.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands, options, and the names of sandboxes, images and checkpoints in SHELL.

    It takes effect in shells that are opened afterwards.
    """
    from click.shell_completion import get_completion_class  # loaded by who completes

    kind = get_completion_class(shell)
    assert kind is not None, "click knows the shells of the choice"
    click.echo(kind(ctx.find_root().command, {}, "taskvm", _VARIABLE).source())
