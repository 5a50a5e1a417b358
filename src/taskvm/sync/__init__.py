"""taskvm for programs that block: the same names, the same arguments, no `await`.

from taskvm.sync import HostDir, Sandbox

with Sandbox.create(mounts={"/workspace": HostDir(".")}) as vm:
    print(vm.exec("ls -l").stdout)

Values, providers and errors are those of `taskvm`. Callbacks and iterators of yours run in the thread that called.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskvm.egress.secret import Secret, SecretArguments
    from taskvm.files import FileInfo
    from taskvm.filewatch import FileChange
    from taskvm.fs.hooks import Hooks
    from taskvm.fs.hostdir import HostDir
    from taskvm.fs.hostfile import HostFile
    from taskvm.fs.memory import Memory
    from taskvm.fs.provider import Provider
    from taskvm.fs.quota import Quota
    from taskvm.fs.readonly import ReadOnly
    from taskvm.fs.router import Router
    from taskvm.fs.shadow import Shadow
    from taskvm.limits import Limits
    from taskvm.printing import printable
    from taskvm.process import ExecResult
    from taskvm.resources import ExecLimits, ExecUsage
    from taskvm.review.changes import Change, ChangeSet, Outcome
    from taskvm.sync.checkpoint import Checkpoint
    from taskvm.sync.files import Files
    from taskvm.sync.filewatch import FileWatch
    from taskvm.sync.forward import Forward
    from taskvm.sync.pool import WarmPool
    from taskvm.sync.process import ByteStream, Process
    from taskvm.sync.sandbox import Sandbox
    from taskvm.sync.supervisor import Attachment, Supervisor
    from taskvm.treecopy import CopyLimits
    from taskvm.usage import Statistics
    from taskvm.wire.supervision import Launch
else:
    from taskvm.exporting import exporter

    __getattr__, __dir__ = exporter(
        __name__,
        {
            "taskvm.egress.secret": "Secret SecretArguments",
            "taskvm.files": "FileInfo",
            "taskvm.filewatch": "FileChange",
            "taskvm.fs.hooks": "Hooks",
            "taskvm.fs.hostdir": "HostDir",
            "taskvm.fs.hostfile": "HostFile",
            "taskvm.fs.memory": "Memory",
            "taskvm.fs.provider": "Provider",
            "taskvm.fs.quota": "Quota",
            "taskvm.fs.readonly": "ReadOnly",
            "taskvm.fs.router": "Router",
            "taskvm.fs.shadow": "Shadow",
            "taskvm.limits": "Limits",
            "taskvm.process": "ExecResult",
            "taskvm.resources": "ExecLimits ExecUsage",
            "taskvm.printing": "printable",
            "taskvm.review.changes": "Change ChangeSet Outcome",
            "taskvm.sync.checkpoint": "Checkpoint",
            "taskvm.sync.files": "Files",
            "taskvm.sync.filewatch": "FileWatch",
            "taskvm.sync.forward": "Forward",
            "taskvm.sync.pool": "WarmPool",
            "taskvm.sync.process": "ByteStream Process",
            "taskvm.sync.sandbox": "Sandbox",
            "taskvm.sync.supervisor": "Attachment Supervisor",
            "taskvm.treecopy": "CopyLimits",
            "taskvm.usage": "Statistics",
            "taskvm.wire.supervision": "Launch",
        },
    )

__all__ = [  # noqa: RUF022  # most important first, as in taskvm
    "Sandbox",
    "Checkpoint",
    "HostDir",
    "HostFile",
    "Secret",
    "SecretArguments",
    "ExecResult",
    "ExecUsage",
    "ExecLimits",
    "Process",
    "ByteStream",
    "Files",
    "FileInfo",
    "FileWatch",
    "FileChange",
    "CopyLimits",
    "ChangeSet",
    "Change",
    "Outcome",
    "printable",
    "WarmPool",
    "Limits",
    "Statistics",
    "Supervisor",
    "Attachment",
    "Launch",
    "Provider",
    "Memory",
    "ReadOnly",
    "Shadow",
    "Router",
    "Quota",
    "Hooks",
    "Forward",
]
