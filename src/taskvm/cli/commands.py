"""All commands of the program, together.

Rule: importing a command's module is cheap; what it needs of the engine it asks `taskvm` for when it runs.
"""

from __future__ import annotations

from taskvm.cli import (
    attached,
    checkpoint,
    completion,
    doctor,
    image,
    log,
    policy,
    run,
    sandboxes,
    secret,
    supervisor,
)
from taskvm.cli.group import main

__all__ = ["main"]

for _command in (
    run.run,
    attached.shell,
    sandboxes.start,
    sandboxes.ps,
    attached.attach,
    attached.exec_,
    sandboxes.logs,
    sandboxes.cp,
    sandboxes.publish,
    sandboxes.kill,
    sandboxes.stop,
    supervisor.supervisor,
    image.image,
    checkpoint.checkpoint,
    policy.policy,
    secret.secret,
    log.log,
    doctor.doctor,
    completion.completion,
):
    main.add_command(_command)
