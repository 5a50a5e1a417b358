"""The command line: a thin shell over the public names of the package, one module for each group of commands."""

from __future__ import annotations

from taskvm.cli import doctor, image, policy, run
from taskvm.cli.group import main

__all__ = ["main"]

for _command in (run.run, run.shell, image.image, doctor.doctor, policy.policy):
    main.add_command(_command)
